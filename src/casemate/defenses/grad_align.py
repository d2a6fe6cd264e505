"""GradAlign: one step, and gradients at neighbouring images kept in line (Andriushchenko & Flammarion 2020, and the
authors' code)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.attacks.ascent import l2_step, sign_step
from casemate.defenses.alarm import accuracy
from casemate.defenses.base import Defense
from casemate.defenses.crafting import BatchNormMode, crafting
from casemate.defenses.one_step import OneStep
from casemate.fields import NonNegative, Positive, spec
from casemate.trainable import Context, Update


@spec
class GradAlign(OneStep, Defense):
    """Minimise CE(f(x_adv), y) + weight (1 - mean cos(g(x), g(x + u))), g being the input gradient of the CE, u
    uniform in the ball (not cut to [0, 1]), and x_adv one step of 1.25 radii from x, projected on the ball.

    g(x) is a constant, and also what the step follows. Three forward passes, two input gradients and one weight
    gradient per batch, and the gradient of the second input gradient, which costs as much as four forward passes: 11
    in all. Images without a gradient are left out of the mean.
    """

    weight: NonNegative = 0.2
    """lambda: for CIFAR-10 0.02 x 10^(radius / (8/255)), so 0.2 at 8/255 and 2 at 16/255; for SVHN 2.5 at 8/255."""
    step_factor: Positive = 1.25
    """Length of the step over the radius. From the image itself the ball cuts what is above 1."""
    init: Literal["zero", "uniform"] = "zero"
    """The start: the image itself, or uniform in the ball and cut to [0, 1] as in fgsm_rs; one forward pass and one
    input gradient more."""
    bn_mode_attack: Literal["eval", "train", "train_update"] = "train_update"
    """Of all passes but that of x_adv: gradients that are compared are of one function."""

    def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, threat = ctx.modules["classifier"], self.ramped(ctx)

        start = x if self.init == "zero" else threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            clean = slope(classifier, x, y)
            followed = clean if self.init == "zero" else slope(classifier, start, y)
        direction = sign_step if threat.norm == "linf" else l2_step
        x_adv = threat.project(start + self.step_factor * threat.radius * direction(followed), x)
        noisy = threat.random_start(x, ctx.rng)

        def loss() -> Tensor:
            with in_mode(classifier, self.bn_mode_attack):
                near = slope(classifier, noisy, y, create_graph=True)
            apart = misalignment(clean, near)
            logits = classifier(x_adv).float()
            ctx.log(train_robust=accuracy(logits, y), alignment=1 - apart)
            return F.cross_entropy(logits, y) + self.weight * apart

        yield Update(("classifier",), loss)
        self.watch(ctx)


def slope(classifier: nn.Module, at: Tensor, y: Tensor, *, create_graph: bool = False) -> Tensor:
    """The gradient (like `at`) of each image's cross-entropy; with `create_graph` a function of the weights."""
    leaf = at.detach().requires_grad_()
    total = F.cross_entropy(classifier(leaf).float(), y, reduction="sum")
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=create_graph)
    return gradient


def misalignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean of 1 - cos(a_i, b_i) over the rows (N x ...) where both have a direction; 0 if there is none."""
    a, b = a.flatten(1), b.flatten(1)
    kept = a.any(1) & b.any(1)
    # Scaled, for the gradients of images that are learnt fall below what a cosine guards its divisors with.
    a, b = (_scaled(torch.where(kept[:, None], rows, torch.ones_like(rows))) for rows in (a, b))
    apart = torch.where(kept, 1 - F.cosine_similarity(a, b), 0.0)
    return apart.sum() / kept.sum().clamp_min(1)


def _scaled(rows: Tensor) -> Tensor:
    """Rows whose largest entry is 1."""
    return rows / rows.detach().abs().amax(1, keepdim=True)


@contextmanager
def in_mode(module: nn.Module, bn: BatchNormMode) -> Iterator[None]:
    """The modes of `crafting`, with parameters that learn."""
    parts = [(part, part.training) for part in module.modules()]
    norms = [(part, part.track_running_stats) for part, _ in parts if isinstance(part, _BatchNorm)]
    try:
        for part, _ in parts:
            part.training = bn != "eval"
        for norm, tracking in norms:
            norm.track_running_stats = tracking and bn != "train"
        yield
    finally:
        for part, training in parts:
            part.training = training
        for norm, tracking in norms:
            norm.track_running_stats = tracking
