"""IWDD: training on images that an internal Wasserstein GAN makes (defense of the internal Wasserstein distance).

min over h of E[beta CE(h(x), y) + max over x~ near x of CE(h(x~), y)], where near means that the patches of x~ are
distributed as those of x: one conditional generator g and one critic pyramid f for the whole training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, crafting
from casemate.fields import Count, NonNegative, Positive, Unit, spec
from casemate.iwd import Windows
from casemate.iwd.sliced import directions, sliced
from casemate.networks.patch_pyramid import PyramidCritic, PyramidGenerator, pyramid_sizes, resized, size_of
from casemate.networks.singan import gradient_penalty
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context, Player, Task, Update

WINDOWS, DIRECTIONS, AT_ONCE = Windows(size=7), 64, 8
"""Of the distance that `iwd_eps` bounds: patches, directions, and how many images are projected at once."""
MANY, FEW = 128, 3
"""Sides from which the number of scales is SinGAN's; smaller images have FEW."""
INSIDE = 0.9
"""The share of augmented images that "augment" counts as inside."""


@spec
class IWDD(AscentSchedule, Defense):
    """Algorithm 2 with its errors mended: `critic_steps` updates of f on E f(x~) - E f(x) + `penalty` R, the penalty
    lowering what f gains; `generator_steps` of g on -E f(x~) - `tau` CE(h(x~), y) + `reconstruction` MSE; one of h on
    `beta` CE(h(x), y) + CE(h(x~), y). The paper's recipe for h is SGD 0.1, batch 128, 200 epochs.

    With 3 and 3 steps: five forward passes of the classifier, three input gradients and two weight gradients per
    batch; seven forward passes of g and three of its weight gradients, `reconstruction` adding three of both; three
    updates of f with a gradient of a gradient, and three passes through it. The default is the paper's; for a CPU and
    64 pixels `width` 8, `scales` 2, `critic_steps` and `generator_steps` 1. Nothing here is bounded in lp: see
    `iwdd_plus_pgd`.
    """

    batch_coupled: ClassVar[bool] = True  # by the pair's batch norms

    tau: NonNegative = 0.1
    """Weight of the classification loss in what g minimises."""
    beta: NonNegative = 0.1
    """Weight of the CLEAN term: the adversarial one has weight 1."""
    ce_cap: Positive | None = None
    """CE of an image above which g gains nothing: without it, an image that is wrong can be ruined for more."""
    critic_steps: Count = 3
    generator_steps: Count = 3
    penalty: NonNegative = 0.1
    penalty_norm: Literal["pixel", "image"] = "pixel"
    """Of the slope at mixed images: SinGAN's, of the sum of scores over the channels of each pixel; or WGAN-GP's, of
    an image's mean score over the whole image, which goes with `penalty` 10."""
    critic_norm: Literal["batch", "none"] = "batch"
    reconstruction: NonNegative = 10.0
    """Weight of MSE(g(x, fixed noise), x), summed over scales as f's terms are."""
    noise: Literal["reconstruction", "constant"] = "reconstruction"
    """Amplitude at a scale: `noise_factor` times the root mean square of what the coarser scales' reconstruction
    lacks there (at the coarsest: of the image about its mean colour), or `noise_factor` itself."""
    noise_factor: NonNegative = 0.1
    scales: Count | None = None
    """None: three below 128 pixels, and SinGAN's number from there on, ten at 224."""
    coarsest: Count = 25
    largest: Count = 250
    """Sides of the coarsest scale and of the finest; a larger image is scaled up from the finest."""
    width: Count = 32
    """Filters of the four coarsest scales."""
    adversary_lr: Positive = 0.0005
    """Of Adam (0.5, 0.999), constant, for g and f."""
    warmup: Unit = 0.01
    """Share of the budget at first in which the pair learns with `tau` 0 and h from clean images: 2 of 200 epochs."""
    iwd_eps: Positive | Literal["augment"] | None = None
    """Images farther than this fall back to x: a sliced Wasserstein distance of their 7 x 7 patches (directions of
    length 1), or "augment", what 90 % of x's own shifts and flips keep within. None leaves the ball to f."""
    bn_joint: Literal["concat", "separate"] = "concat"
    """h's update: one forward pass on x and x~ together, or two, each with batch statistics of its own."""
    pgd_share: Unit = 0.0
    """Share of the batch whose x~ is projected gradient ascent in the threat model instead."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        channels, height, width = task.input_shape
        few = FEW if min(height, width, self.largest) < MANY else None
        sizes = pyramid_sizes(height, width, self.scales or few, coarsest=self.coarsest, largest=self.largest)
        return {
            "classifier": task.network(),
            "generator": PyramidGenerator(channels, sizes, width=self.width),
            "critic": PyramidCritic(channels, len(sizes), width=self.width, norm=self.critic_norm),
        }

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer for h; Adam at a constant rate for the pair, the critic in float32."""
        found = super().players(task, modules)
        for name, precision in (("generator", "auto"), ("critic", "fp32")):
            own = list(modules[name].parameters())
            optimizer = torch.optim.Adam(own, lr=self.adversary_lr, betas=(0.5, 0.999))
            found[name] = Player(own, optimizer, precision=precision)  # type: ignore[arg-type]
        return found

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        h, g = ctx.modules["classifier"], cast(PyramidGenerator, ctx.modules["generator"])
        pair = Pair(self, ctx, g.pyramid(2 * x - 1))
        warming = ctx.fraction < self.warmup

        for _ in range(self.critic_steps):
            yield pair.critic_update()
        for _ in range(self.generator_steps):
            yield pair.generator_update(x, y, 0.0 if warming else self.tau)
        if warming:
            yield Update(("classifier",), lambda: F.cross_entropy(h(x).float(), y))
            return

        with torch.no_grad(), ctx.autocast():
            x_adv = pair.images(g(pair.real, pair.draw()), x)
        if self.iwd_eps is not None:
            x_adv = self._kept(ctx, x_adv, x)
        if self.pgd_share:
            x_adv = self._partly_pgd(ctx, x_adv, x, y)
        yield Update(("classifier",), lambda: self._outer(ctx, x, x_adv, y))

    def _outer(self, ctx: Context, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        h = ctx.modules["classifier"]
        if self.bn_joint == "concat":
            clean, adversarial = h(torch.cat([x, x_adv])).float().split(len(x))
        else:
            clean, adversarial = h(x).float(), h(x_adv).float()
        natural, robust = F.cross_entropy(clean, y), F.cross_entropy(adversarial, y)
        ctx.log(natural=natural, robust=robust, moved=(x_adv - x).abs().mean())
        return self.beta * natural + robust

    @torch.no_grad()
    def _kept(self, ctx: Context, x_adv: Tensor, x: Tensor) -> Tensor:
        """`x_adv` where it is near enough, `x` elsewhere."""
        theta = directions(DIRECTIONS, x.shape[1], WINDOWS, ctx.rng)
        if self.iwd_eps == "augment":
            allowed = torch.quantile(distance(x, shifted(x, ctx.rng), theta), INSIDE)
        else:
            allowed = torch.as_tensor(cast(float, self.iwd_eps), device=x.device)
        near = distance(x, x_adv, theta) <= allowed
        ctx.log(rejected=1 - near.float().mean())
        return torch.where(near[:, None, None, None], x_adv, x)

    def _partly_pgd(self, ctx: Context, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The first images of the batch, whose order is random, moved by ascent on CE instead."""
        h, n = ctx.modules["classifier"], round(self.pgd_share * len(x))
        if not n:
            return x_adv
        ascent, goal = self.ascent(ctx.threat, ctx.fraction), untargeted(y[:n])
        start = ascent.threat.random_start(x[:n], ctx.rng).clamp(0, 1)
        with crafting(h), ctx.autocast():
            moved = ascent(lambda at: cross_entropy(h(at).float(), goal), x[:n], start)
        return torch.cat([moved, x_adv[n:]])


@dataclass
class Pair:
    """g and f on one batch: `real` are its images at every scale, in [-1, 1]."""

    method: IWDD
    ctx: Context
    real: Sequence[Tensor]

    def critic_update(self) -> Update:
        """f on E f(x~) - E f(x) + penalty R, at every scale; g only draws."""
        g, f = self.ctx.modules["generator"], cast(PyramidCritic, self.ctx.modules["critic"])
        noise, n = self.draw(), len(self.real[0])
        rho = torch.rand(n, generator=self.ctx.rng).to(self.real[0].device)

        def loss() -> Tensor:
            with torch.no_grad():
                made = g(self.real, noise)
            gap = total(f(self.real)) - total(f(made))
            sides = zip(f.scales, self.real, made, strict=True)
            norm = self.method.penalty_norm
            slack = torch.stack([gradient_penalty(c, a, b, rho, norm=norm).mean() for c, a, b in sides]).sum()
            self.ctx.log(patch_gap=gap, patch_penalty=slack)
            return self.method.penalty * slack - gap

        return Update(("critic",), loss)

    def generator_update(self, x: Tensor, y: Tensor, tau: float) -> Update:
        """g on -E f(x~) - tau CE(h(x~), y) + reconstruction MSE. f is in train mode, but keeps its statistics."""
        ctx = self.ctx
        h, g, f = (ctx.modules[name] for name in ("classifier", "generator", "critic"))
        noise, cap = self.draw(), self.method.ce_cap

        def loss() -> Tensor:
            made = g(self.real, noise)
            with crafting(f, bn="train"), crafting(h):
                value = -total(f(made))
                if tau:
                    entropy = F.cross_entropy(h(self.images(made, x)).float(), y, reduction="none")
                    ctx.log(attacked=entropy.mean())
                    value = value - tau * (entropy if cap is None else entropy.clamp(max=cap)).mean()
            if self.method.reconstruction:
                again = g(self.real, self._fixed())
                apart = torch.stack([F.mse_loss(a.float(), b) for a, b in zip(again, self.real, strict=True)]).sum()
                ctx.log(reconstruction=apart)
                if self.method.noise == "reconstruction":
                    ctx.state["left"] = left_over(self.real, again).detach()
                value = value + self.method.reconstruction * apart
            return value

        return Update(("generator",), loss)

    def images(self, made: Sequence[Tensor], x: Tensor) -> Tensor:
        """The finest scale as images like `x`."""
        return ((resized(made[-1].float(), size_of(x)) + 1) / 2).clamp(0, 1)

    def draw(self) -> list[Tensor]:
        """Noise for every scale."""
        drawn = [torch.randn(part.shape, generator=self.ctx.rng).to(part.device) for part in self.real]
        return [size * z for size, z in zip(self._amplitudes(), drawn, strict=True)]

    def _fixed(self) -> list[Tensor]:
        """One noise for all images and steps at the coarsest scale, none above, as SinGAN reconstructs."""
        first = self.real[0]
        if "fixed" not in self.ctx.state:
            self.ctx.state["fixed"] = torch.randn(1, *first.shape[1:], generator=self.ctx.rng)
        z = (self._amplitudes()[0] * self.ctx.state["fixed"].to(first.device)).expand_as(first)
        return [z, *(torch.zeros_like(part) for part in self.real[1:])]

    def _amplitudes(self) -> Tensor:
        """One for each scale; before there is a reconstruction, as if it were perfect."""
        factor, device = self.method.noise_factor, self.real[0].device
        if self.method.noise == "constant":
            return torch.full((len(self.real),), factor, device=device)
        if "left" not in self.ctx.state:
            self.ctx.state["left"] = left_over(self.real, self.real)
        return factor * self.ctx.state["left"].to(device)


def total(scores: Sequence[Tensor]) -> Tensor:
    """The value of a critic pyramid: each scale's mean over patches and images, summed, so that every scale's
    generator weighs it against the classification loss as if it were alone."""
    return torch.stack([maps.float().mean() for maps in scores]).sum()


def left_over(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """(scales,) root mean square of what `made` at the next coarser scale, scaled up, lacks of the images; of the
    coarsest images about their mean colour."""
    lacks = [real[0] - real[0].mean((2, 3), keepdim=True)]
    for fine, coarse in zip(real[1:], made[:-1], strict=True):
        lacks.append(fine - resized(coarse.float(), size_of(fine)))
    return torch.stack([lack.square().mean().sqrt() for lack in lacks])


def distance(x: Tensor, x_adv: Tensor, theta: Tensor) -> Tensor:
    """(N,) sliced distances of each pair along `theta`, a few images at a time."""
    pairs = zip(torch.split(x, AT_ONCE), torch.split(x_adv, AT_ONCE), strict=True)
    return torch.cat([sliced(before, after, WINDOWS, theta).value for before, after in pairs])


def shifted(x: Tensor, rng: torch.Generator) -> Tensor:
    """The usual augmentation: crops of images in a frame of zeros, an eighth of their height; half are flipped."""
    n, _, height, width = x.shape
    pad = max(1, height // 8)
    padded = F.pad(x, (pad, pad, pad, pad))
    down, right, flip = (torch.randint(0, top, (n,), generator=rng) for top in (2 * pad + 1, 2 * pad + 1, 2))
    out = [
        image[:, i : i + height, j : j + width].flip(2) if turn else image[:, i : i + height, j : j + width]
        for image, i, j, turn in zip(padded, down.tolist(), right.tolist(), flip.tolist(), strict=True)
    ]
    return torch.stack(out)
