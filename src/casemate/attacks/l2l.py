"""Generators that learn to attack step by step: L2L (Jiang et al. 2021) and L2L-DA (Jang et al. 2019).

Both move a perturbation from 0 by delta <- clip(delta + step * u), u in [-1, 1] being what a network makes of the
image and the input gradient at the perturbed image, and both are trained through all their steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from casemate.attacks.ascent import per_sample
from casemate.attacks.base import Cost
from casemate.attacks.chunk import Chunk, Rows
from casemate.attacks.learned import (
    LearnedAttack,
    NeedsWeights,
    conclude,
    concluding_queries,
    look,
    offer,
    slope,
)
from casemate.fields import Count, Flag, Natural, NonNegative, Positive, spec
from casemate.networks.base import Shape, require_divisible
from casemate.networks.generators import SlimAttacker, UNetGenerator, WideAttacker
from casemate.objectives import cross_entropy
from casemate.system import View
from casemate.threat import Goal, Norm, ThreatModel, untargeted
from casemate.trainable import Context, Player, Task, Update

Logits = Callable[[Tensor], Tensor]


@dataclass
class Path(Rows):
    """Where the recursion stands, one entry per image."""

    x: Tensor
    gradient: Tensor
    """At x + delta, unscaled."""
    delta: Tensor
    labels: Tensor
    z: Tensor
    """L x z_dim."""

    def image(self) -> Tensor:
        """The perturbed images, cut to [0, 1]."""
        return (self.x + self.delta).clamp(0.0, 1.0)


@spec
class Recursive(LearnedAttack):
    """A generator that is called `steps` times, each time with the gradient at where it has come."""

    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})

    steps: Count = 1
    step_factor: Positive = 1.0
    """Step size over radius."""

    @property
    def noise(self) -> int:
        """Numbers of noise that one perturbation takes."""
        return 0

    @abstractmethod
    def direction(self, modules: dict[str, nn.Module], path: Path) -> Tensor:
        """L x C x H x W in [-1, 1]."""

    def advance(self, modules: dict[str, nn.Module], path: Path, threat: ThreatModel) -> Path:
        """One step; differentiable in the generator, through `path.delta` in its earlier calls too."""
        move = self.step_factor * threat.radius * self.direction(modules, path).float()
        return replace(path, delta=(path.delta + move).clamp(-threat.radius, threat.radius))

    def begin(self, x: Tensor, gradient: Tensor, labels: Tensor, z: Tensor) -> Path:
        """At the clean images."""
        rows = torch.arange(len(x), device=x.device)
        return Path(rows, x, gradient, torch.zeros_like(x), labels, z)

    def rollout(
        self, modules: dict[str, nn.Module], victim: Logits, path: Path, goal: Goal, threat: ThreatModel
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x_adv, logits, CE (N,)) after every step, CE differentiable in the generator.

        One pass of the victim per step: the gradient of the CE with respect to x_adv is what the next step looks at,
        and all that the generator's own gradient needs of the victim.
        """
        for _ in range(self.steps):
            path = self.advance(modules, path, threat)
            x_adv = path.image()
            logits, values, gradient = slope(victim, x_adv, goal)
            path = replace(path, gradient=gradient)
            yield x_adv, logits, values + ((x_adv - x_adv.detach()) * gradient).flatten(1).sum(1)


# --- L2L ------------------------------------------------------------------------------------------------------


@spec
class L2LTrainer(Recursive):
    """Fits L2L's attacker: raises the CE after the last step. One step of the whole radius is Grad L2L, two are
    2-Step L2L, and k steps of 0.226 (0.007 over 0.031) its k-step form.

    Two changes against the official code: the gradient is divided by its largest entry in the image, not in the
    batch, so that no image depends on another; and the box is applied to the sum of the steps in every form.
    """

    network: Literal["wide", "slim"] = "slim"
    """The authors' default is "wide", which works at full resolution and costs 4.6 times as much."""
    width: Count = 32
    """Of the first layer; the authors' is 64 for "wide" and 128 for "slim"."""

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        channels = input_shape[0]
        if self.network == "slim":
            require_divisible("L2L's slim attacker", input_shape, 2)
        made = WideAttacker if self.network == "wide" else SlimAttacker
        return {"generator": made(2 * channels, channels, width=self.width)}

    def direction(self, modules: dict[str, nn.Module], path: Path) -> Tensor:
        top = per_sample(path.gradient.flatten(1).abs().amax(1), path.gradient)
        out: Tensor = modules["generator"](torch.cat([path.image(), path.gradient / top], 1))
        return out

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, goal = self.victim(ctx), untargeted(y)
        with ctx.autocast():
            path = self.begin(x, slope(victim, x, goal)[2], y, x.new_empty(len(x), 0))

        def loss() -> Tensor:
            *_, (_, logits, values) = self.rollout(ctx.modules, victim, path, goal, ctx.threat)
            ctx.log(fooled=goal.reached(logits.argmax(1)).float().mean())
            return -values.mean()

        yield Update(("generator",), loss)


# --- L2L-DA ---------------------------------------------------------------------------------------------------

RAW = 0.01
"""Factor on gradients that are not normalised: what the authors' mean over a batch of 100 images gives."""


@spec
class L2LDATrainer(Recursive):
    """Fits L2L-DA's recursive generator: raises CE + `diversity` x D over all steps, with two noises for each image.

    D = |x_adv(z1) - x_adv(z2)| / |z1 - z2|. Every switch of the paper's ablation is here; steps 1, step_factor 1,
    z_dim 0, condition, feed_delta false and gradient_norm "none" is its re-implementation of L2L.
    """

    steps: Count = 10
    step_factor: Positive = 0.25
    width: Count = 16
    """The authors' is 64."""
    deeper: Flag = False
    """A third level, as in the authors' network for larger images."""
    z_dim: Natural = 8
    condition: Flag = True
    """The label enters every normalisation."""
    feed_delta: Flag = True
    """The generator sees the perturbation so far."""
    gradient_norm: Literal["rms", "channel", "image", "none"] = "rms"
    """What an input gradient is divided by: its root mean square in the image, its l2 norm in each channel (code) or
    in the image (paper), or nothing. The paper's are smaller by the root of the number of pixels, and need a longer
    fit."""
    diversity: NonNegative = 0.02
    """0.02 for MNIST, 0.5 for CIFAR-10, 0.3 for Tiny ImageNet in the paper."""
    diversity_norm: Literal["mean", "sum"] = "mean"
    """|.| is the mean of absolute values (code) or their sum (paper), which weighs D by pixels / z_dim more."""
    loss_at: Literal["every", "last"] = "every"
    diversity_at: Literal["every", "last"] = "every"
    over_steps: Literal["sum", "mean"] = "sum"
    """How the steps' losses are put together: summed (code) or averaged (paper)."""
    max_grad_norm: Positive | None = 1.0

    @property
    def noise(self) -> int:
        return self.z_dim

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        channels = input_shape[0]
        made = UNetGenerator(
            (3 if self.feed_delta else 2) * channels, channels, input_shape, width=self.width, z_dim=self.z_dim,
            num_classes=num_classes if self.condition else 0, deeper=self.deeper,
        )  # fmt: skip
        return {"generator": made}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        moved = modules["generator"].parameters()
        return {"generator": task.player(moved, max_grad_norm=self.max_grad_norm)}

    def direction(self, modules: dict[str, nn.Module], path: Path) -> Tensor:
        seen = [path.x, self.normalised(path.gradient), *([path.delta] if self.feed_delta else [])]
        out: Tensor = modules["generator"](torch.cat(seen, 1), path.labels, path.z)
        return out

    def normalised(self, gradient: Tensor) -> Tensor:
        """The gradient as the generator sees it; zero stays zero."""
        if self.gradient_norm == "none":
            return gradient * RAW
        # Divided by its largest entry first: the squares of small gradients are below what float32 holds.
        unit = gradient / per_sample(gradient.flatten(1).abs().amax(1), gradient)
        flat = unit.flatten(2 if self.gradient_norm == "channel" else 1)
        norm: Tensor = flat.norm(dim=-1).clamp_min(torch.finfo(flat.dtype).tiny)
        if self.gradient_norm == "rms":
            norm = norm / flat.shape[-1] ** 0.5
        return unit / norm.view(*norm.shape, *[1] * (unit.dim() - norm.dim()))

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, goal = self.victim(ctx), untargeted(y)
        with ctx.autocast():
            gradient = slope(victim, x, goal)[2]
        if self.z_dim:
            x, y, gradient = (torch.cat([part, part]) for part in (x, y, gradient))
        z = torch.randn(len(x), self.z_dim, generator=ctx.rng).to(x)
        path, goal = self.begin(x, gradient, y, z), untargeted(y)

        def loss() -> Tensor:
            total = x.new_zeros(())
            for t, (x_adv, logits, values) in enumerate(self.rollout(ctx.modules, victim, path, goal, ctx.threat), 1):
                if self.loss_at == "every" or t == self.steps:
                    total = total - values.mean()
                if self.z_dim and (self.diversity_at == "every" or t == self.steps):
                    apart = self.apart(x_adv, z)
                    ctx.log(apart=apart)
                    total = total - self.diversity * apart
                ctx.log(fooled=goal.reached(logits.argmax(1)).float().mean())
            return total / self.steps if self.over_steps == "mean" else total

        yield Update(("generator",), loss)

    def apart(self, x_adv: Tensor, z: Tensor) -> Tensor:
        """D, averaged over images; the two halves of the batch are the two noises."""
        images, noises = (torch.sub(*part.flatten(1).chunk(2)).abs() for part in (x_adv, z))
        if self.diversity_norm == "mean":
            return (images.mean(1) / (noises.mean(1) + 1e-8)).mean()
        return (images.sum(1) / (noises.sum(1) + 1e-8)).mean()


# --- the fitted attacks ---------------------------------------------------------------------------------------


@spec
class RecursiveAttack(NeedsWeights):
    """The recursion with fitted weights, as often as there are `tries`; the gradient at the image is taken once."""

    keep: Literal["best", "last"] = "best"
    """The first perturbed image on the way that succeeds, or only the last step's, as in the authors' code."""

    def tries(self, fitted: Any) -> int:
        """Runs of the recursion, each with noise of its own."""
        return 1

    def search(
        self, fitted: Any, modules: dict[str, nn.Module], view: View, x: Tensor, goal: Goal, threat: ThreatModel,
        seed: int, cost: Cost,
    ) -> Tensor:  # fmt: skip
        chunk = Chunk(view, x, goal, threat, seed, cost, score=cross_entropy)
        logits, gradient = look(chunk, chunk.rows(), x)
        if self._rivals(fitted) or view.exact:
            offer(chunk, chunk.rows(), x, logits)
        start = fitted.begin(x, gradient, goal.labels, x.new_empty(len(x), 0))
        for draw in range(self.tries(fitted)):
            start = start[chunk.standing[start.rows]]
            if not len(start):
                break
            z = torch.randn(len(x), fitted.noise, generator=chunk.noise("draw", draw)).to(x)
            path = replace(start, z=z[start.rows])
            self._climb(fitted, modules, path, chunk, last=draw == self.tries(fitted) - 1)
        return chunk.out

    def _climb(self, fitted: Any, modules: dict[str, nn.Module], path: Path, chunk: Chunk, last: bool) -> None:
        for _ in range(fitted.steps - 1):
            path = fitted.advance(modules, path, chunk.threat)
            x_adv = path.image()
            logits, gradient = look(chunk, path.rows, x_adv)
            path = replace(path, gradient=gradient)
            if self.keep == "best":
                offer(chunk, path.rows, x_adv, logits)
                path = path[chunk.standing[path.rows]]
            if not len(path):
                return
        x_adv = fitted.advance(modules, path, chunk.threat).image()
        conclude(chunk, path.rows, x_adv, last=last, rivals=self._rivals(fitted))

    def _rivals(self, fitted: Any) -> bool:
        return self.tries(fitted) > 1 or (self.keep == "best" and fitted.steps > 1)

    def spends(self, fitted: Any, view: View, n: int) -> tuple[int, int, int]:
        tries = self.tries(fitted)
        looks = n * (1 + tries * (fitted.steps - 1))
        queries = concluding_queries(view, tries, self._rivals(fitted))
        return looks * view.passes[0], looks * view.passes[1], n * queries


@spec
class L2L(RecursiveAttack):
    """L2L's attacker with fitted weights; it has no noise, so there is one try."""

    trainer: ClassVar[type[LearnedAttack]] = L2LTrainer


@spec
class L2LDA(RecursiveAttack):
    """L2L-DA's generator with fitted weights, from `draws` noises: the worst of them counts."""

    trainer: ClassVar[type[LearnedAttack]] = L2LDATrainer

    draws: Count = 10

    def tries(self, fitted: Any) -> int:
        return self.draws if fitted.z_dim else 1
