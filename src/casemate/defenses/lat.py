"""Latent adversarial training (Sinha et al. 2019): a second adversary moves what a hidden layer puts out.

Training follows the authors' code, which alternates a step on latent adversaries with a step on images. There, two
networks pass their weights to and fro, and only the second's running statistics are kept: that is one network whose
latent passes use the statistics of their batch and leave the running ones alone, and two optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, crafting
from casemate.errors import UserError
from casemate.fields import Count, Flag, Positive, Text, Unit, spec
from casemate.networks.base import Classifier
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context, Player, Task, Update


@spec
class LAT(AscentSchedule, Defense):
    """With f = g o h, split after `layer`: minimise omega CE(g(h(x) + d), y) + (1 - omega) CE(f(x_adv), y).

    d ascends the first term within `latent_radius` times the range of each channel, x_adv the second within the ball.
    The codes are constants, so the latent step moves g alone. Each batch costs one pass of h, `latent_steps` + 1
    passes of g with a gradient, and K + 1 of f. The first `adversarial_first` of the budget is adversarial training:
    the published run starts from a network trained so, and is short.
    """

    batch_coupled: ClassVar[bool] = True

    bn_mode_attack: Literal["eval", "train", "train_update"] = "train_update"
    """Of the classifier while images are crafted; latent crafting has the statistics of its batch."""
    adversarial_first: Unit = 0.8
    omega: Unit = 0.2
    """Weight of the latent adversary. Alternating, its learning rate is omega / (1 - omega) times the recipe's."""
    joint: Flag = False
    """One step on the weighted sum, as the paper writes it; False is two steps in turn, as in the code."""
    layer: Text | None = None
    """Name of the layer whose output is moved. Without it the last but one stage or convolution."""
    latent_adversary: Literal["ascent", "noise"] = "ascent"
    """Or Gaussian noise, `latent_radius` being its deviation: feature noise training, the paper's ablation."""
    latent_radius: Positive = 0.0313725490196
    """In units of the range that the code has over the batch."""
    latent_steps: Count = 20
    latent_step: Positive = 0.125
    """In units of the latent radius."""
    latent_range: Literal["channel", "global"] = "channel"
    """The range is each channel's, or that of all channels together."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        if self.omega == 1:
            raise UserError("lat: omega must be below 1: the images need a weight, too")
        return super().modules(task)

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer twice, each with a momentum of its own; no weight decay in the latent step."""
        _, upper = self.halves(modules["classifier"])
        players = super().players(task, modules)
        if not self.joint:
            scale = self.omega / (1 - self.omega)
            players["latent"] = task.player(upper.parameters(), lr_scale=scale, weight_decay=0.0)
        return players

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        f = ctx.modules["classifier"]
        _, g = self.halves(f)
        latent = ctx.fraction >= self.adversarial_first
        codes = self.latent_codes(ctx, x, y) if latent else x

        def latent_loss() -> Tensor:
            with untracked(f):
                return F.cross_entropy(g(codes).float(), y)

        if latent and not self.joint:
            yield Update(("latent",), latent_loss)

        ascent = self.ascent(ctx.threat, ctx.fraction)
        start = ascent.threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(f, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = ascent(lambda at: cross_entropy(f(at).float(), untargeted(y)), x, start)

        def image_loss() -> Tensor:
            return F.cross_entropy(f(x_adv).float(), y)

        def joint_loss() -> Tensor:
            of_codes, of_images = latent_loss(), image_loss()
            ctx.log(latent=of_codes, images=of_images)
            return self.omega * of_codes + (1 - self.omega) * of_images

        yield Update(("classifier",), joint_loss if latent and self.joint else image_loss)

    def halves(self, classifier: nn.Module) -> tuple[nn.Module, nn.Module]:
        """(h, g): the network up to the layer and above it. Raises UserError for an unknown layer."""
        made = cast(Classifier, classifier)
        return made.split(self.layer or usual_layer(made.layers))

    def latent_codes(self, ctx: Context, x: Tensor, y: Tensor) -> Tensor:
        """The adversarial codes of clean images, float32, without a gradient."""
        f = ctx.modules["classifier"]
        h, g = self.halves(f)
        with crafting(f, bn="train"), ctx.autocast():
            with torch.no_grad():
                z = h(x).float()
            low, high = extent(z, per_channel=self.latent_range == "channel")
            radius = self.latent_radius * (high - low)
            if self.latent_adversary == "noise":
                noise = torch.randn(z.shape, generator=ctx.rng).to(z.device)
                return cut(z + radius * noise, low, high)
            noise = torch.rand(z.shape, generator=ctx.rng).to(z.device).mul_(2).sub_(1)
            codes: Tensor = z + radius * noise
            for _ in range(self.latent_steps):
                codes.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(g(codes).float(), y, reduction="sum"), codes)
                moved = codes.detach() + self.latent_step * radius * gradient.sign()
                codes = cut(cut(moved, z - radius, z + radius), low, high)
        return codes


def extent(z: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """(least, greatest) value of codes N x C x ... over the batch and all places, shaped to broadcast over them."""
    axes = [axis for axis in range(z.dim()) if axis != 1 or not per_channel]
    return z.amin(axes, keepdim=True), z.amax(axes, keepdim=True)


def cut(z: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`z` between two bounds that broadcast over it."""
    return torch.minimum(torch.maximum(z, low), high)


def usual_layer(layers: list[str]) -> str:
    """The last but one stage of a residual network, else the last but one convolution, else the first layer."""
    for kind in ("stage", "conv"):
        named = [name for name in layers if name.startswith(kind)]
        if len(named) > 1:
            return named[-2]
    return layers[0]


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """While open, batch normalisation in train mode leaves its running statistics as they are."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    before = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracking in zip(norms, before, strict=True):
            norm.track_running_stats = tracking
