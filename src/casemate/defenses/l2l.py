"""L2L (Jiang et al. 2021): the classifier learns beside a network that learns to attack it, by turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.l2l import L2LTrainer, Path
from casemate.attacks.learned import slope
from casemate.defenses.adversary import AdversaryDefense
from casemate.defenses.crafting import crafting
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, spec
from casemate.networks.base import Shape, require_divisible
from casemate.networks.generators import SlimAttacker, WideAttacker
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Player, Task, Update


@spec
class L2L(AdversaryDefense, L2LTrainer):
    """The classifier takes a step on what the attacker makes of the batch, then the attacker one against the new
    classifier, on the same images. The attacker sees the image and its input gradient.

    `steps` 1 is Grad L2L, 2 is 2-Step L2L, k with `step_factor` 0.226 (0.007 over 0.031) its k-step form;
    `see_gradient` false is Naive L2L. 2 `steps` + 2 forward passes, 2 `steps` + 1 input gradients and one weight
    gradient of the classifier per batch; Naive L2L 2, 1 and 1. The classifier is in train mode wherever it takes
    part in its own step, the query included, and in eval mode in the attacker's; the attacker the other way round.
    """

    network: Literal["wide", "slim"] = "wide"
    """"slim" works at half resolution and costs a quarter."""
    width: Count = 64
    """Channels of the attacker's first layer. Published: 64 for "wide", 128 for "slim"."""
    see_gradient: Flag = True
    gradient_over: Literal["batch", "image"] = "batch"
    """The gradient is divided by its largest entry in the batch, as in the official code, or in each image."""
    bn_mode_attack: Literal["eval", "train", "train_update"] = "train_update"
    """Mode of the classifier while its own batch is crafted."""
    generator_lr: Positive = 0.001
    """Of the attacker's Adam, constant."""
    generator_weight_decay: NonNegative = 0.0002

    def __post_init__(self) -> None:
        if not self.see_gradient and self.steps > 1:
            raise UserError("l2l: an attacker without gradients (see_gradient false) takes one step: set steps to 1")

    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        if self.see_gradient:
            return super().build(input_shape, num_classes)
        if self.network == "slim":
            require_divisible("L2L's slim attacker", input_shape, 2)
        made = WideAttacker if self.network == "wide" else SlimAttacker
        return {"generator": made(input_shape[0], input_shape[0], width=self.width)}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer for the classifier; Adam at a constant rate for the attacker."""
        own = list(modules["generator"].parameters())
        optimizer = torch.optim.Adam(own, lr=self.generator_lr, weight_decay=self.generator_weight_decay)
        return {"classifier": task.player(modules["classifier"].parameters()), "generator": Player(own, optimizer)}

    def direction(self, modules: dict[str, nn.Module], path: Path) -> Tensor:
        if not self.see_gradient:
            seen = path.image()
        elif self.gradient_over == "image":
            return super().direction(modules, path)
        else:
            top = path.gradient.abs().amax().clamp_min(torch.finfo(path.gradient.dtype).tiny)
            seen = torch.cat([path.image(), path.gradient / top], 1)
        out: Tensor = modules["generator"](seen)
        return out

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, attacker = ctx.modules["classifier"], ctx.modules["generator"]
        threat, goal = self.threat(ctx), untargeted(y)

        with crafting(classifier, bn=self.bn_mode_attack), crafting(attacker), ctx.autocast():
            x_adv = self.craft(ctx, self.query(ctx, x, y), threat)
        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x_adv).float(), y))

        with crafting(classifier), ctx.autocast():
            path = self.query(ctx, x, y)

        def loss() -> Tensor:
            with crafting(classifier):
                *_, (_, logits, values) = self.rollout(ctx.modules, classifier, path, goal, threat)
            ctx.log(fooled=goal.reached(logits.argmax(1)).float().mean())
            return -values.mean()

        yield Update(("generator",), loss)

    def query(self, ctx: Context, x: Tensor, y: Tensor) -> Path:
        """The clean images with their gradients, one pass; Naive L2L asks nothing."""
        gradient = torch.zeros_like(x)
        if self.see_gradient:
            gradient = slope(ctx.modules["classifier"], x, untargeted(y))[2]
        return self.begin(x, gradient, y, x.new_empty(len(x), 0))

    @torch.no_grad()
    def craft(self, ctx: Context, path: Path, threat: ThreatModel) -> Tensor:
        """The images after all steps; one pass for each step but the first."""
        for step in range(self.steps):
            if step:
                gradient = slope(ctx.modules["classifier"], path.image(), untargeted(path.labels))[2]
                path = replace(path, gradient=gradient)
            path = self.advance(ctx.modules, path, threat)
        return path.image()
