"""Optimizers whose state is one row per image, so that images can leave the batch and none feels another.

`torch.optim` keeps one state for a whole tensor, cannot drop rows from it, and its L-BFGS couples the images. Here
`optimizer.begin(variables)` gives a state; `state.step(variables, values, gradient)` the next iterate; `state[index]`
the state of some of the images. Everything is minimised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class State(ABC):
    """What an optimizer remembers of each image: every tensor in it has one row per image."""

    @abstractmethod
    def step(self, variables: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        """The next iterate (L x ...), a new tensor, from the values (L,) and the gradient (L x ...) at this one."""

    @abstractmethod
    def __getitem__(self, index: Tensor) -> State:
        """The state of the images at `index` (positions or a mask)."""


class Optimizer(ABC):
    """Numbers only; a run's memory is the `State` it begins with."""

    @abstractmethod
    def begin(self, variables: Tensor) -> State:
        """A fresh state for variables L x ...."""


@dataclass(frozen=True)
class Adam(Optimizer):
    """Kingma & Ba (2015), Algorithm 1. With betas (0, 0) a step is `rate` times g / (|g| + eps)."""

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def begin(self, variables: Tensor) -> State:
        return _Adam(self, torch.zeros_like(variables), torch.zeros_like(variables), 0)


@dataclass
class _Adam(State):
    numbers: Adam
    mean: Tensor
    square: Tensor
    t: int

    def step(self, variables: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        (b1, b2), self.t = self.numbers.betas, self.t + 1
        self.mean.mul_(b1).add_(gradient, alpha=1 - b1)
        self.square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        scale = (self.square / (1 - b2**self.t)).sqrt_().add_(self.numbers.eps)
        return variables.addcdiv(self.mean, scale, value=-self.numbers.rate / (1 - b1**self.t))

    def __getitem__(self, index: Tensor) -> State:
        return _Adam(self.numbers, self.mean[index], self.square[index], self.t)


@dataclass(frozen=True)
class Descent(Optimizer):
    """v <- v - rate * direction(gradient), e.g. `ascent.sign_step`; without a direction the gradient itself."""

    rate: float
    direction: Callable[[Tensor], Tensor] | None = None

    def begin(self, variables: Tensor) -> State:
        return _Descent(self)


@dataclass
class _Descent(State):
    numbers: Descent

    def step(self, variables: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        along = gradient if self.numbers.direction is None else self.numbers.direction(gradient)
        return variables.sub(along, alpha=self.numbers.rate)

    def __getitem__(self, index: Tensor) -> State:
        return self


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """Limited-memory BFGS (Liu & Nocedal 1989), its backtracking by the Armijo rule, each image on its own.

    Every step is one evaluation: where a trial point does not lower the value enough, the next one lies nearer on
    the same line (at the minimum of a parabola, between a tenth and half of the way). After `patience` such points
    the memory is dropped and the image goes on along its gradient, which is what kinks of a hinge ask for. The last
    iterate may therefore be a trial that is worse than the best; let a judge keep the best. Holds 2 * `memory`
    tensors of the size of the variables.
    """

    memory: int = 10
    first: float = 1.0
    """Length (l2) of the first trial step, at most."""
    decrease: float = 1e-4
    patience: int = 10

    def begin(self, variables: Tensor) -> State:
        rows = variables.flatten(1)
        n = len(rows)
        history = rows.new_zeros(n, self.memory, rows.shape[1])
        return _LBFGS(
            self, moves=history, bends=history.clone(), inverse=rows.new_zeros(n, self.memory), point=rows.clone(),
            value=rows.new_full((n,), torch.inf), slope=torch.zeros_like(rows), along=torch.zeros_like(rows),
            share=rows.new_ones(n), refused=torch.zeros(n, dtype=torch.long, device=rows.device),
        )  # fmt: skip


@dataclass
class _LBFGS(State):
    numbers: LBFGS
    moves: Tensor
    """L x memory x D, oldest first: s = v' - v of accepted steps; zero where there is none yet."""
    bends: Tensor
    """L x memory x D: y = g' - g of the same steps."""
    inverse: Tensor
    """L x memory: 1 / <s, y>; zero where there is no step, which takes it out of every sum."""
    point: Tensor
    """L x D, the last accepted point; `value` (L,) and `slope` (L x D) are its value and gradient."""
    value: Tensor
    slope: Tensor
    along: Tensor
    """L x D, the direction searched from `point`; the trial is point + share * along."""
    share: Tensor
    refused: Tensor

    def step(self, variables: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        v, g = variables.flatten(1), gradient.flatten(1)
        fall = (self.slope * self.along).sum(1)
        taken = values <= self.value + self.numbers.decrease * self.share * fall
        self._remember(taken & self.value.isfinite(), v - self.point, g - self.slope)
        row = taken[:, None]
        self.point, self.slope = torch.where(row, v, self.point), torch.where(row, g, self.slope)
        rise = values - self.value - self.share * fall
        shorter = -0.5 * fall * self.share**2 / rise.clamp_min(torch.finfo(rise.dtype).tiny)
        shorter = torch.minimum(torch.maximum(shorter, 0.1 * self.share), 0.5 * self.share)
        self.value = torch.where(taken, values, self.value)
        self.refused = torch.where(taken, 0, self.refused + 1)
        lost = self.refused >= self.numbers.patience
        self.inverse = self.inverse.masked_fill(lost[:, None], 0.0)
        self.refused = self.refused.masked_fill(lost, 0)
        anew = taken | lost
        self.along = torch.where(anew[:, None], self._direction(), self.along)
        bare = ~self.inverse.any(1)  # no curvature known: a step of known length along the gradient
        length = self.slope.norm(dim=1)
        start = (self.numbers.first / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp(max=1.0)
        self.share = torch.where(anew, torch.where(bare, start, torch.ones_like(start)), shorter)
        return (self.point + self.share[:, None] * self.along).view_as(variables)

    def _remember(self, taken: Tensor, move: Tensor, bend: Tensor) -> None:
        """Push the step where its curvature is positive, so that the direction goes down."""
        curvature = (move * bend).sum(1)
        sound = taken & (curvature > 1e-10 * (bend * bend).sum(1))
        inverse = 1 / torch.where(sound, curvature, torch.ones_like(curvature))
        for name, newest in (("moves", move), ("bends", bend), ("inverse", inverse)):
            old: Tensor = getattr(self, name)
            pushed = torch.cat([old[:, 1:], newest[:, None]], dim=1)
            setattr(self, name, torch.where(sound.view(-1, *[1] * (old.dim() - 1)), pushed, old))

    def _direction(self) -> Tensor:
        """Minus the inverse Hessian's estimate times the gradient, by the two loops over the memory."""
        q, shares = self.slope.clone(), []
        for i in reversed(range(self.numbers.memory)):
            share = self.inverse[:, i] * (self.moves[:, i] * q).sum(1)
            shares.append(share)
            q -= share[:, None] * self.bends[:, i]
        newest = self.bends[:, -1]
        known = self.inverse[:, -1] != 0
        scale = 1 / (self.inverse[:, -1] * (newest * newest).sum(1)).where(known, torch.ones_like(self.share))
        q *= scale[:, None]
        for i, share in enumerate(reversed(shares)):
            back = self.inverse[:, i] * (self.bends[:, i] * q).sum(1)
            q += (share - back)[:, None] * self.moves[:, i]
        return q.neg_()

    def __getitem__(self, index: Tensor) -> State:
        names = ("moves", "bends", "inverse", "point", "value", "slope", "along", "share", "refused")
        return _LBFGS(self.numbers, *(getattr(self, name)[index] for name in names))
