"""EXP-AM and IMP-AM: adversarial distributions that a generator gives at once (Dong et al. 2020, sections 3.2, 3.3).

The generator sees the image and two input gradients, at the image and at its FGSM point. Scaled down against the
authors' code, which has `width` 256 (10.3 M parameters) and 150 epochs; the gradients of one image do not depend on
the others (`gradient_input`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.base import Cost
from casemate.attacks.chunk import Chunk
from casemate.attacks.distributions import (
    TanhGaussian,
    posterior_surprisal,
    scaled_gradient,
    uniform_noise,
)
from casemate.attacks.learned import (
    LearnedAttack,
    NeedsWeights,
    conclude,
    concluding_queries,
    look,
    offer,
    slope,
)
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, Real, spec
from casemate.networks.base import Shape
from casemate.networks.generators import PosteriorEncoder, ResidualGenerator
from casemate.objectives import cross_entropy
from casemate.system import View, frozen
from casemate.threat import Goal, Norm, ThreatModel, untargeted
from casemate.trainable import Context, Player, Task, Update

Sampler = Callable[[Tensor, Tensor], Tensor]
"""(positions of images (L,) long, their noise L x ...) -> adversarial images L x C x H x W."""


@spec
class Amortised(LearnedAttack):
    """What both have in common: the networks' size, and what the generator sees."""

    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})

    width: Count = 32
    """Channels of the first layer; the authors' has 256."""
    gradient_input: Literal["batch", "batch64", "maxabs", "frobenius", "rms"] = "rms"
    """How input gradients are scaled: "batch64" as the authors' batch mean over 64 images, which leaves the generator
    all but blind to them at the start, or each image's to a largest entry, an l2 norm or a root mean square of 1.
    "batch", the mean over the batch at hand, is for training a defense alone."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        if self.gradient_input == "batch":
            raise UserError("gradient_input batch would let an image's attack depend on its batch: use batch64")
        return super().modules(task)

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer; Adam with beta1 0.5 for the generator, as in the authors' code."""
        found = {"generator": task.player(modules["generator"].parameters(), betas=(0.5, 0.999))}
        if "encoder" in modules:
            found["encoder"] = task.player(modules["encoder"].parameters())
        return found

    @abstractmethod
    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Noise for images of that shape, on the CPU."""

    @abstractmethod
    def sampler(self, modules: dict[str, nn.Module], seen: Tensor, x: Tensor, threat: ThreatModel) -> Sampler:
        """The distributions around `x` that the generator gives for what it has `seen`."""

    def seen(self, x: Tensor, at_x: Tensor, at_fgsm: Tensor) -> Tensor:
        """The generator's input, N x 3C x H x W: images and the two gradients."""
        gradients = (scaled_gradient(g, self.gradient_input) for g in (at_x, at_fgsm))
        return torch.cat([x, *gradients], 1)

    def observe(self, ctx: Context, x: Tensor, goal: Goal) -> Tensor:
        """`seen` in training: two passes of the victim."""
        victim = self.victim(ctx)
        with ctx.autocast():
            at_x = slope(victim, x, goal)[2]
            return self.seen(x, at_x, slope(victim, fgsm(x, at_x, ctx.threat), goal)[2])


def fgsm(x: Tensor, gradient: Tensor, threat: ThreatModel) -> Tensor:
    """The one-step point in which the second gradient is taken."""
    return threat.project(x + threat.radius * gradient.sign(), x)


@spec
class ExpAMTrainer(Amortised):
    """Fits a generator of means and widths: maximises CE + `entropy` x H on one sample per image."""

    entropy: NonNegative = 0.01
    entropy_over: Literal["mean", "sum"] = "mean"
    """Per pixel as in the authors' code, or of the whole image as in the paper."""

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        channels = input_shape[0]
        return {"generator": ResidualGenerator(3 * channels, 2 * channels, width=self.width)}

    def distribution(self, modules: dict[str, nn.Module], seen: Tensor, threat: ThreatModel) -> TanhGaussian:
        """The distributions of the images that were `seen`."""
        mean, rho = modules["generator"](seen).float().chunk(2, 1)
        return TanhGaussian(mean, rho, threat.radius)

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=rng)

    def sampler(self, modules: dict[str, nn.Module], seen: Tensor, x: Tensor, threat: ThreatModel) -> Sampler:
        found = self.distribution(modules, seen, threat)
        return lambda at, noise: found[at].perturb(x[at], noise)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, goal = self.victim(ctx), untargeted(y)
        seen, noise = self.observe(ctx, x, goal), self.noise(x.shape, ctx.rng).to(x)

        def loss() -> Tensor:
            found = self.distribution(ctx.modules, seen, ctx.threat)
            logits = victim(found.perturb(x, noise)).float()
            surprisal = found.surprisal(noise).flatten(1)
            entropy = (surprisal.mean(1) if self.entropy_over == "mean" else surprisal.sum(1)).mean()
            ctx.log(fooled=goal.reached(logits.detach().argmax(1)).float().mean(), entropy=entropy)
            return -cross_entropy(logits, goal).mean() - self.entropy * entropy

        yield Update(("generator",), loss)


@spec
class ImpAMTrainer(Amortised):
    """Fits a generator that turns uniform noise into perturbations, and an encoder that reads the noise back: CE is
    raised, and `entropy` x max(U - `threshold`, 0) lowered, U being the encoder's surprisal of the noise per number.

    The authors' threshold lies above the 0.8696 that an encoder reaches without looking, so U presses on the
    generator only at the start; U is logged, and so is `spread`, how far the noise moves a perturbation.
    """

    z_dim: Count = 64
    encoder_width: Count = 32
    entropy: NonNegative = 1.0
    """1 in the authors' code, 0.01 in the paper."""
    threshold: Real | None = 0.9
    """None for no threshold, as in the paper."""

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        channels, size = input_shape[0], input_shape[1:]
        made = ResidualGenerator(3 * channels + 1, channels, width=self.width, z_dim=self.z_dim, size=size)
        return {
            "generator": made,
            "encoder": PosteriorEncoder(channels, self.z_dim, size, width=self.encoder_width),
        }

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return uniform_noise(shape[0], self.z_dim, rng)

    def sampler(self, modules: dict[str, nn.Module], seen: Tensor, x: Tensor, threat: ThreatModel) -> Sampler:
        return lambda at, z: (x[at] + threat.radius * self.pattern(modules, seen[at], z)).clamp(0.0, 1.0)

    def pattern(self, modules: dict[str, nn.Module], seen: Tensor, z: Tensor) -> Tensor:
        """Perturbations over the radius, in (-1, 1)."""
        return torch.tanh(modules["generator"](seen, z).float())

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, goal = self.victim(ctx), untargeted(y)
        seen, z = self.observe(ctx, x, goal), self.noise(x.shape, ctx.rng).to(x)

        def loss() -> Tensor:
            pattern = self.pattern(ctx.modules, seen, z)
            surprisal = posterior_surprisal(z, *ctx.modules["encoder"](pattern)).mean()
            logits = victim((x + ctx.threat.radius * pattern).clamp(0.0, 1.0)).float()
            ctx.log(fooled=goal.reached(logits.detach().argmax(1)).float().mean(), surprisal=surprisal)
            pressed = surprisal if self.threshold is None else F.relu(surprisal - self.threshold)
            return -cross_entropy(logits, goal).mean() + self.entropy * pressed

        yield Update(("generator", "encoder"), loss)

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        """Logs the standard deviation over noise of the perturbation over the radius, on 32 images and 8 draws."""
        x, y = ctx.draw(32)
        with frozen(ctx.modules["generator"]):
            seen = self.observe(ctx, x, untargeted(y))
            with torch.no_grad():
                draws = [self.pattern(ctx.modules, seen, self.noise(x.shape, ctx.rng).to(x)) for _ in range(8)]
        ctx.log(spread=torch.stack(draws).std(0).mean())


@spec
class AmortisedAttack(NeedsWeights):
    """The two gradients, one look of the generator, and the worst of `draws` samples; the authors draw one."""

    draws: Count = 10

    def search(
        self, fitted: Any, modules: dict[str, nn.Module], view: View, x: Tensor, goal: Goal, threat: ThreatModel,
        seed: int, cost: Cost,
    ) -> Tensor:  # fmt: skip
        chunk = Chunk(view, x, goal, threat, seed, cost, score=cross_entropy)
        rows = chunk.rows()
        logits, at_x = look(chunk, rows, x)
        if self.draws > 1 or view.exact:
            offer(chunk, rows, x, logits)
        left = chunk.standing[rows]
        rows, at_x = rows[left], at_x[left]
        if not len(rows):
            return chunk.out
        _, at_fgsm = look(chunk, rows, fgsm(x[rows], at_x, threat))
        sample = fitted.sampler(modules, fitted.seen(x[rows], at_x, at_fgsm), x[rows], threat)
        for draw in range(self.draws):
            at = chunk.standing[rows].nonzero()[:, 0]
            if not len(at):
                break
            noise = fitted.noise(x.shape, chunk.noise("draw", draw)).to(x)[rows[at]]
            conclude(chunk, rows[at], sample(at, noise), last=draw == self.draws - 1, rivals=self.draws > 1)
        return chunk.out

    def spends(self, fitted: Any, view: View, n: int) -> tuple[int, int, int]:
        queries = concluding_queries(view, self.draws, rivals=self.draws > 1)
        return 2 * n * view.passes[0], 2 * n * view.passes[1], n * queries


@spec
class ExpAM(AmortisedAttack):
    """EXP-AM with fitted weights: samples of the tanh-Gaussians that the generator gives."""

    trainer: ClassVar[type[LearnedAttack]] = ExpAMTrainer


@spec
class ImpAM(AmortisedAttack):
    """IMP-AM with fitted weights: the generator's perturbations for uniform noise."""

    trainer: ClassVar[type[LearnedAttack]] = ImpAMTrainer
