"""Adversarial images by moving pixel mass (Wong, Schmidt & Kolter 2019): gradient steps, projected Sinkhorn.

An image is mass on the pixel grid, one grid per channel, of sum 1 over all channels. Moving mass by d costs
|d|^power, and it moves no further than half a window. This is not the internal Wasserstein distance over patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.warping import in_box, same
from casemate.errors import UserError
from casemate.fields import Count, Positive, spec
from casemate.objectives import objective
from casemate.system import View
from casemate.threat import TOLERANCE, Goal, ThreatModel

SLICE = 1 << 18
"""Numbers (pixels times channels) that are projected at a time; bounds the memory, changes no result."""
STILL = 1e-7
"""Relative change of a dual value that counts as none."""
TINY = 1e-300
PRICIEST = 1e4
"""Bound of the price of distance: exp(-1e4) is nothing, so no mass moves at all."""


@dataclass(frozen=True)
class Window:
    """Where mass may go from a pixel, and at what cost."""

    size: int
    power: float

    def offsets(self) -> list[tuple[int, int]]:
        """(down, right) of every pixel of the window but its middle, in the order of a transport plan's columns."""
        reach = range(-(self.size // 2), self.size // 2 + 1)
        return [(row, column) for row in reach for column in reach if (row, column) != (0, 0)]

    def costs(self) -> list[float]:
        """What moving a unit of mass by each offset costs."""
        return [float(row**2 + column**2) ** (self.power / 2) for row, column in self.offsets()]

    def rings(self) -> tuple[Tensor, Tensor]:
        """(R different costs ascending from 0, R x 1 x size x size masks of the offsets of each)."""
        line = torch.arange(self.size, dtype=torch.float64) - self.size // 2
        squares = line.square() + line.square()[:, None]
        found = torch.tensor(sorted({row**2 + column**2 for row, column in [(0, 0), *self.offsets()]})).double()
        masks = (squares == found.view(-1, 1, 1)).double()
        return found ** (self.power / 2), masks[:, None]


@dataclass(frozen=True)
class MassBudget:
    """Images whose mass is the clean one's, moved at a cost of at most `radius` per unit of mass, then cut to [0, 1].

    The cut destroys mass above white, as the authors' does.
    """

    radius: float
    window: Window
    norm: ClassVar[str] = "wasserstein"

    def contains(self, x_adv: Tensor, x: Tensor, plan: Tensor) -> Tensor:
        """(N,) bool. `plan` (N x C x offsets x H x W, pixel units) says how much goes from each pixel to where: it
        must take no more than is there, cost no more than allowed, leave the grid nowhere, and give `x_adv`."""
        out, into, cost = plan.sum(2), torch.zeros_like(x), torch.zeros_like(x[:, 0, 0, 0])
        lost = torch.zeros_like(cost)
        for i, (step, price) in enumerate(zip(self.window.offsets(), self.window.costs(), strict=True)):
            arriving = _shifted(plan[:, :, i], step)
            into += arriving
            cost += price * plan[:, :, i].flatten(1).sum(1)
            lost += plan[:, :, i].flatten(1).sum(1) - arriving.flatten(1).sum(1)
        mass = x.flatten(1).sum(1)
        sound = (plan.flatten(1).amin(1) >= 0) & ((out - x).flatten(1).amax(1) <= TOLERANCE)
        paid = (cost <= self.radius * mass * (1 + 1e-4)) & (lost <= 1e-4 * mass)
        return in_box(x_adv) & sound & paid & same((x - out + into).clamp(max=1), x_adv)

    def __str__(self) -> str:
        return f"pixel mass {self.radius:g}"


@spec
class PixelMassWasserstein(Attack):
    """Signed steps projected on a Wasserstein ball that grows until the image falls, or the ball is `radius`.

    The projection is entropic, and its plan is mixed with standing still until it costs what is allowed: the images
    lie in the ball without any tolerance on the projection's convergence. Its own ball is its budget: it counts in
    an lp worst case only where its image happens to lie in that ball. Dear: each step is an optimisation.
    """

    radius: Positive = 0.1
    """Largest ball, in pixels^power per unit of mass: 0.1 on CIFAR-10, 1 on MNIST."""
    first: Positive = 0.001
    """Radius of the first ball."""
    growth: Positive = 1.17
    """Factor after every `every` steps."""
    every: Count = 10
    steps: Count = 400
    step_size: Positive = 0.1
    """In pixel units."""
    window: Count = 5
    """Side of the square that a pixel's mass may spread over; odd."""
    power: Positive = 2.0
    regularisation: Positive = 3000.0
    """Weight of exactness against entropy; 1000 suits MNIST."""
    sinkhorn_steps: Count = 400
    """At most, for each projection."""
    objective: Literal["ce", "margin"] = "ce"

    def __post_init__(self) -> None:
        if self.window % 2 == 0 or self.window < 3:
            raise UserError(f"PixelMassWasserstein: window must be odd and at least 3, and is {self.window}")
        if self.growth < 1:
            raise UserError(f"PixelMassWasserstein: growth must be at least 1, and is {self.growth:g}")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        return _Growing(self, view, x, goal, cost).run()

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return n * self.steps * view.passes[0], n * self.steps * view.passes[1], 0 if view.exact else n

    def ball(self, step: int) -> float:
        """The radius at a step."""
        return min(self.radius, self.first * self.growth ** (step // self.every))

    def budget(self, threat: ThreatModel) -> MassBudget:
        return MassBudget(self.radius, Window(self.window, self.power))


@dataclass
class Transport:
    """How mass moves, compactly: pixel i gives pixel i + o scale * give_i * exp(-psi * cost_o - 1) * take_(i+o)."""

    give: Tensor
    """N x C x H x W, float64; with `take` the exponentials of the dual variables."""
    take: Tensor
    psi: Tensor
    """(N,), the price of distance."""
    scale: Tensor
    """(N,), pixel units; includes the share of the mass that moves at all."""

    def __getitem__(self, index: Tensor | slice) -> Transport:
        return Transport(self.give[index], self.take[index], self.psi[index], self.scale[index])

    def __setitem__(self, index: Tensor, value: Transport) -> None:
        self.give[index], self.take[index] = value.give, value.take
        self.psi[index], self.scale[index] = value.psi, value.scale

    @classmethod
    def none(cls, x: Tensor) -> Transport:
        """No mass moves."""
        zeros = x.new_zeros(x.shape, dtype=torch.float64)
        return cls(zeros, zeros.clone(), zeros[:, 0, 0, 0].clone(), zeros[:, 0, 0, 0].clone())

    def plan(self, x: Tensor, window: Window) -> Tensor:
        """N x C x offsets x H x W in pixel units, of the dtype of `x`; no more than is there leaves a pixel."""
        parts = [
            self.give * _shifted(self.take, (-step[0], -step[1])) * _per(self.scale * (-self.psi * price - 1).exp())
            for step, price in zip(window.offsets(), window.costs(), strict=True)
        ]
        return torch.stack(parts, dim=2).to(x)


@dataclass
class _Growing:
    """One run on a chunk."""

    attack: PixelMassWasserstein
    view: View
    x: Tensor
    goal: Goal
    cost: Cost

    def run(self) -> Shown:
        attack, rows = self.attack, torch.arange(len(self.x), device=self.x.device)
        self.loss, self.window = objective(attack.objective), Window(attack.window, attack.power)
        self.out, self.kept = self.x.clone(), Transport.none(self.x)
        self.best = self.x.new_full((len(self.x),), -torch.inf)
        rows = rows[self.x.flatten(1).any(1)]  # black images have no mass to move
        x_adv, transport = self.x[rows], self.kept[rows]
        for t in range(attack.steps):
            if not len(rows):
                return self._shown()
            leaf = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                logits = self.view.logits(leaf)
                values = self.loss(logits, self.goal[rows])
            self.cost.forwards[rows.cpu()] += self.view.passes[0]
            left = ~self._judge(rows, logits.detach(), values.detach(), x_adv, transport)
            if not bool(left.any()):
                return self._shown()
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
            self.cost.backwards[rows.cpu()] += self.view.passes[1]
            rows, x_adv, gradient = rows[left], x_adv[left], gradient[left]
            x_adv, transport = self._project(self.x[rows], x_adv + attack.step_size * gradient.sign(), attack.ball(t))
        if self.view.exact:  # the last one is judged by the verification of the result
            self.out[rows], self.kept[rows] = x_adv, transport
        else:
            with torch.no_grad():
                logits = self.view.logits(x_adv)
                self._judge(rows, logits, self.loss(logits, self.goal[rows]), x_adv, transport)
            self.cost.queries[rows.cpu()] += 1
        return self._shown()

    def _judge(self, rows: Tensor, logits: Tensor, values: Tensor, x_adv: Tensor, transport: Transport) -> Tensor:
        """Keep the first success, or on a view that is not exact the best; (L,) bool: what is finished."""
        fallen = self.goal[rows].reached(self.view.labels(logits, x_adv)) & self.view.exact
        better = fallen if self.view.exact else values > self.best[rows]
        self.best[rows[better]], self.out[rows[better]] = values[better], x_adv[better]
        self.kept[rows[better]] = transport[better]
        return fallen

    def _project(self, x: Tensor, wanted: Tensor, radius: float) -> tuple[Tensor, Transport]:
        attack, many = self.attack, max(1, SLICE // x[0].numel())
        images, parts = [], []
        for start in range(0, len(x), many):
            at = slice(start, start + many)
            found = project(x[at], wanted[at], radius, self.window, attack.regularisation, attack.sinkhorn_steps)
            images.append(found[0])
            parts.append(found[1])
        joined = (torch.cat([getattr(p, name) for p in parts]) for name in ("give", "take", "psi", "scale"))
        return torch.cat(images), Transport(*joined)

    def _shown(self) -> Shown:
        return Shown(self.out, self.kept.plan(self.x, self.window))


def project(
    x: Tensor, wanted: Tensor, radius: float, window: Window, regularisation: float, steps: int
) -> tuple[Tensor, Transport]:
    """The image near `wanted` in the Wasserstein ball of `radius` around `x` (N x C x H x W, mass above 0), cut to
    [0, 1], and how its mass moved (Wong et al. 2019, Algorithm 2).

    Block ascent in the dual of: minimise lambda/2 |z - wanted|^2 - entropy(plan) over plans from x to z that cost at
    most the radius. An image is finished when its dual value stands still. In float64.
    """
    mass = x.double().flatten(1).sum(1)
    source = x.double() / _per(mass)
    costs, masks = (part.to(x.device) for part in window.rings())
    solver = _Sinkhorn(source, wanted.double() / _per(mass), radius, regularisation, costs, masks)
    found, rows = Transport.none(x), torch.arange(len(x), device=x.device)
    for step in range(steps):
        stopped = solver.step()
        if step + 1 == steps:
            stopped = torch.ones_like(stopped)
        if bool(stopped.any()):
            found[rows[stopped]] = solver.transport()[stopped]
            rows = rows[~stopped]
            if not len(rows):
                break
            solver.keep(~stopped)
    moved, spent = _moved(found, costs, masks)
    found.scale = found.scale * mass * (radius / spent.clamp_min(TINY)).clamp(max=1.0)
    return (x.double() + moved * _per(found.scale)).clamp(0, 1).to(x), found


def _moved(transport: Transport, costs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(change of each pixel's mass, (N,) cost) where the scale is 1."""
    kernel = _kernel(transport.psi, costs)
    taken = _rings(transport.take, masks)
    arriving = transport.take * _mix(_rings(transport.give, masks), kernel)
    leaving = transport.give * _mix(taken, kernel)
    return arriving - leaving, (transport.give * _mix(taken, kernel * costs)).flatten(1).sum(1)


class _Sinkhorn:
    """The dual variables of a batch. With t the largest beta of an image, `give` is exp(alpha + t) and `take`
    exp(beta - t): their product is the plan's, and neither overflows."""

    def __init__(
        self, source: Tensor, target: Tensor, radius: float, weight: float, costs: Tensor, masks: Tensor
    ) -> None:
        self.source, self.target, self.radius, self.weight = source, target, radius, weight
        self.costs, self.masks = costs, masks
        self.beta, self.psi = torch.zeros_like(source), source.new_ones(len(source))
        self.value = source.new_full((len(source),), -torch.inf)
        self._take()

    def _take(self) -> None:
        self.top = self.beta.flatten(1).amax(1)
        self.take = (self.beta - _per(self.top)).exp()
        self.taken = _rings(self.take, self.masks)

    def _give(self) -> Tensor:
        """The best alpha: every pixel gives just what it has."""
        return self.source / _mix(self.taken, _kernel(self.psi, self.costs)).clamp_min(TINY)

    def step(self) -> Tensor:
        """Ascend in alpha, beta and psi; (N,) bool: where the dual value stood still since the step before."""
        give, kernel = self._give(), _kernel(self.psi, self.costs)
        before, self.value = self.value, self._dual(give)
        wanted = self.weight * self.target
        reach = _mix(_rings(give, self.masks), kernel).clamp_min(TINY).log() - _per(self.top)
        self.beta = wanted - lambert(wanted + reach + math.log(self.weight))
        top = self.top
        self._take()
        give = give * _per((self.top - top).exp())
        spent = (give * _mix(self.taken, kernel * self.costs)).flatten(1).sum(1)
        bend = (give * _mix(self.taken, kernel * self.costs**2)).flatten(1).sum(1)
        self.psi = (self.psi + (spent - self.radius) / bend.clamp_min(TINY)).clamp(0, PRICIEST)
        return (self.value - before).abs() <= STILL * (1 + self.value.abs())

    def _dual(self, give: Tensor) -> Tensor:
        """(N,) the dual value right after the step in alpha, when the plan's mass is that of the image, 1."""
        alpha = torch.xlogy(self.source, give) - self.source * _per(self.top)
        gain = alpha + self.beta * self.target - self.beta.square() / (2 * self.weight)
        return gain.flatten(1).sum(1) - self.psi * self.radius - 1

    def transport(self) -> Transport:
        """What the variables stand for, all mass leaving where it is."""
        return Transport(self._give(), self.take, self.psi, torch.ones_like(self.psi))

    def keep(self, rows: Tensor) -> None:
        for name in ("source", "target", "beta", "psi", "value", "top", "take", "taken"):
            setattr(self, name, getattr(self, name)[rows])


def lambert(exponent: Tensor) -> Tensor:
    """W(exp(exponent)), the u > 0 with u + log u = exponent, by Newton's method; without overflow."""
    y = exponent.clamp_min(-700.0)
    u = torch.where(y > 1, y - y.clamp_min(1).log(), y.clamp(max=1).exp())
    for _ in range(6):  # the error is below 1e-14 after five from anywhere
        u = u * (1 + y - u.log()) / (1 + u)
    return u


def _kernel(psi: Tensor, costs: Tensor) -> Tensor:
    """(N x R) exp(-psi * cost - 1)."""
    return (-psi[:, None] * costs - 1).exp()


def _rings(values: Tensor, masks: Tensor) -> Tensor:
    """N x C x R x H x W: the sum over all pixels at each of the R distances."""
    n, c, height, width = values.shape
    summed = F.conv2d(values.reshape(n * c, 1, height, width), masks, padding=masks.shape[-1] // 2)
    return summed.view(n, c, -1, height, width)


def _mix(rings: Tensor, kernel: Tensor) -> Tensor:
    """N x C x H x W: the rings, weighted by the kernel (N x R)."""
    return torch.einsum("ncrhw,nr->nchw", rings, kernel)


def _shifted(values: Tensor, step: tuple[int, int]) -> Tensor:
    """N x C x H x W moved down and right by `step`; zero comes in, and what leaves the grid is lost."""
    (down, right), (height, width) = step, values.shape[-2:]
    padded = F.pad(values, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    return padded[..., max(-down, 0) : max(-down, 0) + height, max(-right, 0) : max(-right, 0) + width]


def _per(values: Tensor) -> Tensor:
    """(N,) shaped to broadcast over images."""
    return values.view(-1, 1, 1, 1)
