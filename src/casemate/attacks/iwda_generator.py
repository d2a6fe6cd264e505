"""IWDA with one generator for a data set: x_adv = clip(x + psi(x + noise)), fitted to the victim by a patch critic.

The paper trains a generator for each picture (`iwda`); this is what its defense meets, and what small pictures allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.internal import IWDBudget, check_pictures, nearest_success
from casemate.attacks.learned import FittedAttack, LearnedAttack, NeedsWeights
from casemate.attacks.pyramid import classification_loss, critic_loss, values
from casemate.errors import UserError
from casemate.fields import Count, Natural, NonNegative, Positive, spec
from casemate.iwd import Windows
from casemate.iwd.sliced import directions, sliced
from casemate.networks.base import Shape
from casemate.networks.patch_pyramid import PyramidCritic, PyramidGenerator, Size, pyramid_sizes, resized, size_of
from casemate.networks.singan import PATCH, Scores
from casemate.seeding import generator
from casemate.system import Offer, View, frozen
from casemate.threat import Goal, ThreatModel, targeted, untargeted
from casemate.trainable import Context, Update


@spec
class IWDAGeneratorTrainer(LearnedAttack):
    """Fits generators, one for each scale: on what is left of the coarser scale each writes a residual, from the
    picture with noise. Each batch moves the critics `critic_steps` times and the generators once, by minus the
    critic's value + `reconstruction` * MSE without noise + `tau` * L_c. One pass of the victim per batch.
    """

    tau: NonNegative = 0.1
    objective: Literal["ce", "margin"] = "ce"
    cap: NonNegative | None = 5.0
    """The classification loss pays no further; None in the paper."""
    target: Natural | None = None
    """The class to aim at (pictures of it are left alone); by default away from the label."""
    matching: Literal["conditional", "pooled", "sliced"] = "conditional"
    """What holds a picture to its own patches. `conditional`: a critic of clean and changed patches of one place
    together, which bounds the IWD of each pair from above. `pooled`: the paper's formula in a batch, whose patches
    may wander between pictures. `sliced`: no critic, the sliced distance of each pair."""
    penalty: NonNegative = 0.1
    penalty_norm: Literal["pixel", "image"] = "pixel"
    reconstruction: NonNegative = 10.0
    """SinGAN's; without (0, the paper's loss) little else ties a sample to what its picture shows."""
    critic_steps: Count = 3
    scales: Count = 1
    coarsest: Count = 12
    """Shorter side of the coarsest of several scales."""
    width: Count = 32
    """Filters; doubled every four scales."""
    amplitude: NonNegative = 0.1
    """Of the noise, where pictures are in [-1, 1]."""
    projections: Count = 64
    """Directions per step of `sliced`."""

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        if len(self._sizes(input_shape)) < self.scales:
            raise UserError(
                f"iwda_generator: pictures of {input_shape[1]}x{input_shape[2]} are no larger than the coarsest of "
                f"{self.scales} scales, {self.coarsest} pixels: one scale is all they allow"
            )
        if self.target is not None and self.target >= num_classes:
            raise UserError(f"iwda_generator: target must lie in 0 to {num_classes - 1}, and is {self.target}")
        channels = input_shape[0]
        made: dict[str, nn.Module] = {
            "generator": PyramidGenerator(channels, self._sizes(input_shape), width=self.width)
        }
        if self.matching != "sliced":
            seen = 2 * channels if self.matching == "conditional" else channels
            made["critic"] = PyramidCritic(seen, self.scales, width=self.width, norm="none")
        return made

    def _sizes(self, input_shape: tuple[int, ...]) -> list[Size]:
        height, width = input_shape[-2:]
        coarsest = min(self.coarsest, height, width)
        return pyramid_sizes(height, width, self.scales, coarsest=coarsest, largest=max(height, width))

    def levels(self, x: Tensor) -> list[Tensor]:
        """The pictures at every scale, in [-1, 1]."""
        return [resized(x, size) * 2 - 1 for size in self._sizes(tuple(x.shape))]

    def write(self, modules: dict[str, nn.Module], levels: list[Tensor], rng: torch.Generator | None) -> list[Tensor]:
        """What the generators make of the pictures at every scale; without a generator of noise, without noise."""
        made: list[Tensor] = []
        for net, real in zip(cast(PyramidGenerator, modules["generator"]).scales, levels, strict=True):
            previous = real
            if made:  # the difference is scaled up, not the picture: detail stays
                size = size_of(real)
                previous = real + resized(made[-1] - levels[len(made) - 1], size)
            noise = torch.zeros_like(real) if rng is None else torch.randn(real.shape, generator=rng).to(real)
            made.append(net(real + self.amplitude * noise, previous).float())
        return made

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, levels = self.victim(ctx), self.levels(x)
        for _ in range(self.critic_steps if "critic" in ctx.modules else 0):
            with torch.no_grad(), ctx.autocast():
                made = self.write(ctx.modules, levels, ctx.rng)
            rho = torch.rand(len(x), generator=ctx.rng).to(x)
            yield Update(("critic",), partial(self._critic_loss, ctx, levels, made, rho))

        noise_seed = int(torch.randint(2**62, (), generator=ctx.rng))

        def generator_loss() -> Tensor:
            made = self.write(ctx.modules, levels, generator(noise_seed))
            far = self._far(ctx, levels, made, noise_seed)
            ctx.log(apart=(shown(made[-1]) - x).abs().mean())
            total = far + self.tau * self._adversarial(ctx, victim(shown(made[-1])).float(), y)
            if self.reconstruction:
                rebuilt = self.write(ctx.modules, levels, None)
                for one, real in zip(rebuilt, levels, strict=True):
                    total = total + self.reconstruction * (one - real).square().mean()
            return total

        yield Update(("generator",), generator_loss)

    def _critics(self, ctx: Context, levels: list[Tensor]) -> Iterator[Scores]:
        """The critic of each scale. A conditional one sees the clean picture beside what it scores; the penalty is on
        the slope with respect to the latter."""
        for critic, real in zip(cast(PyramidCritic, ctx.modules["critic"]).scales, levels, strict=True):
            if self.matching == "pooled":
                yield critic
            else:
                yield partial(_beside, critic, real)

    def _critic_loss(self, ctx: Context, levels: list[Tensor], made: list[Tensor], rho: Tensor) -> Tensor:
        losses = [
            critic_loss(critic, real, fake, rho, weight=self.penalty, norm=self.penalty_norm).mean()
            for critic, real, fake in zip(self._critics(ctx, levels), levels, made, strict=True)
        ]
        return torch.stack(losses).sum()

    def _far(self, ctx: Context, levels: list[Tensor], made: list[Tensor], seed: int) -> Tensor:
        """What holds pictures to their patches, summed over scales: minus the critics' values, or the distance."""
        if self.matching != "sliced":
            pairs = zip(self._critics(ctx, levels), made, strict=True)
            return torch.stack([-values(critic, fake).mean() for critic, fake in pairs]).sum()
        windows = Windows(size=PATCH)
        along = directions(self.projections, levels[0].shape[1], windows, generator(seed, "directions"))
        found = [sliced(real, fake, windows, along).value.mean() for fake, real in zip(made, levels, strict=True)]
        return torch.stack(found).sum()

    def _adversarial(self, ctx: Context, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean L_c of the batch; pictures that are of the target class already pay nothing."""
        goal = untargeted(labels) if self.target is None else targeted(labels, torch.full_like(labels, self.target))
        apply = torch.ones_like(labels, dtype=torch.bool) if self.target is None else labels != self.target
        ctx.log(fooled=(goal.reached(logits.detach().argmax(1)) & apply).float().mean())
        return (classification_loss(logits, goal, self.objective, self.cap) * apply).mean()


def _beside(critic: nn.Module, real: Tensor, images: Tensor) -> Tensor:
    scores: Tensor = critic(torch.cat([real, images], dim=1))
    return scores


def shown(made: Tensor) -> Tensor:
    """[-1, 1] -> what a classifier sees."""
    return ((made + 1) / 2).clamp(0, 1)


@spec
class IWDAGenerator(NeedsWeights):
    """The fitted generators' samples; of those that succeed the nearest is kept. No further search: labels and scores
    suffice."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"scores"})
    trainer: ClassVar[type[LearnedAttack]] = IWDAGeneratorTrainer

    samples: Count = 10
    """Draws that are judged; 1 for the success rate at one draw."""
    radius: Positive | None = None
    """Hard limit of the exact IWD: a draw beyond is brought back along the line to the picture. None for no limit."""

    def search(
        self, fitted: IWDAGeneratorTrainer, modules: dict[str, nn.Module], view: View, x: Tensor, goal: Goal,
        threat: ThreatModel, seed: int, cost: Cost,
    ) -> Tensor:  # fmt: skip
        check_pictures("iwda_generator", x, goal, PATCH)
        levels = fitted.levels(x)
        samples = (
            shown(fitted.write(modules, levels, generator(seed, "sample", k))[-1]) for k in range(self.samples)
        )
        return nearest_success(view, x, goal, samples, IWDBudget(self.radius), cost)

    def spends(self, fitted: Any, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n * self.samples

    def with_weights(
        self, fitted: LearnedAttack, weights: dict[str, Tensor], *, input_shape: Shape, num_classes: int
    ) -> Attack:
        if not isinstance(fitted, IWDAGeneratorTrainer):
            return super().with_weights(fitted, weights, input_shape=input_shape, num_classes=num_classes)  # refused
        return FittedIWDA(self, fitted, weights, input_shape=input_shape, num_classes=num_classes)


class FittedIWDA(FittedAttack):
    """The bound attack, whose budget is the IWD and not a ball."""

    attack: IWDAGenerator
    fitted: IWDAGeneratorTrainer

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:  # type: ignore[override]
        networks = self.networks.to(x.device)
        with torch.no_grad(), frozen(networks):
            x_adv = self.attack.search(self.fitted, dict(networks.items()), view, x, goal, threat, seed, cost)
        return self.budget(threat).shown(x_adv, x)

    def budget(self, threat: ThreatModel) -> IWDBudget:
        return IWDBudget(self.attack.radius)
