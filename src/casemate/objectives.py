"""What an attack maximises: functions (logits N x C, goal) -> one value per sample (N,).

Values are per sample and never averaged: a batch mean would scale every step that is not a sign step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.errors import UserError, near
from casemate.threat import Goal

Objective = Callable[[Tensor, Goal], Tensor]


def cross_entropy(logits: Tensor, goal: Goal) -> Tensor:
    """CE of the true class, or minus that of the target."""
    if goal.targets is not None:
        return -F.cross_entropy(logits, goal.targets, reduction="none")
    return F.cross_entropy(logits, goal.labels, reduction="none")


def margin(logits: Tensor, goal: Goal) -> Tensor:
    """max_{j != y} z_j - z_y (C&W with a hinge that never closes), or z_t - max_{j != t} z_j."""
    chosen = goal.labels if goal.targets is None else goal.targets
    own = logits.gather(1, chosen[:, None])[:, 0]
    other = logits.scatter(1, chosen[:, None], -torch.inf).amax(1)
    return other - own if goal.targets is None else own - other


def capped_margin(kappa: float) -> Objective:
    """min(margin, kappa), the Carlini & Wagner (2017) loss up to a constant: no gradient once the margin is kappa."""
    return lambda logits, goal: margin(logits, goal).clamp(max=kappa)


def dlr(logits: Tensor, goal: Goal) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6 and 8), z_(k) being the k-th largest logit:
    (max_{j != y} z_j - z_y) / (z_(1) - z_(3)), or (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) towards a target.

    The same for a z + b (a > 0), so that large logits cannot hide the slope. Raises UserError below 3 classes (4).
    """
    needed, classes = 3 if goal.targets is None else 4, logits.shape[1]
    if classes < needed:
        towards = " towards a target" if goal.targets is not None else ""
        raise UserError(f"objective dlr{towards} needs {needed} classes, and there are {classes}: use margin")
    top = logits.topk(needed, dim=1).values
    if goal.targets is None:
        return margin(logits, goal) / (top[:, 0] - top[:, 2] + 1e-12)
    return difference(logits, goal) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def difference(logits: Tensor, goal: Goal) -> Tensor:
    """z_t - z_y: zero where the decision passes from the label to the target, if no third class is in between."""
    assert goal.targets is not None, "a difference of logits is between a label and a target"
    return (logits.gather(1, goal.targets[:, None]) - logits.gather(1, goal.labels[:, None]))[:, 0]


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def objective(name: str) -> Objective:
    """The objective of that name. Raises UserError with the near matches."""
    if name not in OBJECTIVES:
        raise UserError(f"unknown objective {name!r}{near(name, OBJECTIVES)}")
    return OBJECTIVES[name]
