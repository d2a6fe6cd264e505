"""GAP-like generator attack (Poursaeed et al. 2018, image-dependent): one pass of a network fitted to the victim.

As in L2L-DA's comparison (Jang et al. 2019) it is judged by true labels and cut to [0, 1]. Two changes against
the authors' code: group normalisation, so that an image's perturbation depends on no other image, and a tanh times
the radius in the place of rescaling to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.ascent import l2_step
from casemate.attacks.base import Cost
from casemate.attacks.learned import LearnedAttack, NeedsWeights
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, spec
from casemate.networks.base import Shape
from casemate.objectives import capped_margin, cross_entropy
from casemate.system import Offer, View
from casemate.threat import Goal, ThreatModel, untargeted
from casemate.trainable import Context, Update


class Generator(nn.Module):
    """N x C x H x W images of any size from 4 x 4 -> values in [-1, 1] of the same shape.

    Two halvings, `blocks` residual blocks at a quarter of the size, two doublings, a tanh.
    """

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = _layer(channels, width)
        self.down1, self.down2 = _layer(width, 2 * width, stride=2), _layer(2 * width, 4 * width, stride=2)
        self.middle = nn.ModuleList(
            nn.Sequential(_layer(4 * width, 4 * width), _layer(4 * width, 4 * width)) for _ in range(blocks)
        )
        self.up1, self.up2 = _layer(4 * width, 2 * width), _layer(2 * width, width)
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.stem(x - 0.5)
        half = self.down1(full)
        h = self.down2(half)
        for block in self.middle:
            h = h + block(h)
        h = self.up1(F.interpolate(h, size=half.shape[-2:]))
        h = self.up2(F.interpolate(h, size=full.shape[-2:]))
        return torch.tanh(self.head(h))


def _layer(width_in: int, width_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(1, width_out), nn.ReLU())


@spec
class GAPTrainer(LearnedAttack):
    """Fits the generator: maximises the victim's loss on the perturbed batch, by true labels, with the recipe's
    optimizer. One forward and one input gradient of the victim per batch."""

    width: Count = 16
    """Channels at full size; the authors' has 64, for ImageNet."""
    blocks: Count = 2
    objective: Literal["ce", "margin"] = "margin"
    """Cross-entropy grows without end on images that have fallen; the margin stops paying at `kappa`."""
    kappa: NonNegative = 5.0

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        if min(input_shape[1:]) < 4:
            raise UserError(f"gap needs images of at least 4 x 4 pixels, not {input_shape[1]} x {input_shape[2]}")
        return {"generator": Generator(input_shape[0], self.width, self.blocks)}

    def perturb(self, modules: dict[str, nn.Module], x: Tensor, threat: ThreatModel) -> Tensor:
        """Adversarial images inside the budget, differentiable in the generator."""
        direction = modules["generator"](x).float()
        if threat.norm == "l2":
            direction = l2_step(direction)
        x_adv: Tensor = (x + threat.radius * direction).clamp(0.0, 1.0)
        return x_adv

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        victim, goal = self.victim(ctx), untargeted(y)
        objective = cross_entropy if self.objective == "ce" else capped_margin(self.kappa)

        def loss() -> Tensor:
            logits = victim(self.perturb(ctx.modules, x, ctx.threat)).float()
            ctx.log(fooled=goal.reached(logits.detach().argmax(1)).float().mean())
            return -objective(logits, goal).mean()

        yield Update(("generator",), loss)


@spec
class GAP(NeedsWeights):
    """The fitted generator's one pass: no further search, and labels suffice."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    trainer: ClassVar[type[LearnedAttack]] = GAPTrainer
    aimable: ClassVar[bool] = False

    def search(
        self, fitted: GAPTrainer, modules: dict[str, nn.Module], view: View, x: Tensor, goal: Goal,
        threat: ThreatModel, seed: int, cost: Cost,
    ) -> Tensor:  # fmt: skip
        return fitted.perturb(modules, x, threat)
