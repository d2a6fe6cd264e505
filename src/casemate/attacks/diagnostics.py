"""Signs that an attack cannot see a slope (Carlini et al. 2019, section 4; the masking gate asks for them)."""

from __future__ import annotations

import sys
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from casemate.objectives import Objective, cross_entropy
from casemate.system import View
from casemate.threat import Goal


def zero_gradients(view: View, x: Tensor, goal: Goal, objective: Objective = cross_entropy) -> Tensor:
    """(N,) bool: images whose input gradient is zero in every pixel, at `x` itself. One pass. Call it with the
    system frozen (`with system.frozen():`), as every attack does for itself."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(view.logits(leaf), goal).sum(), leaf)
    return ~gradient.flatten(1).any(1)


def zero_gradient_share(view: View, x: Tensor, goal: Goal, objective: Objective = cross_entropy) -> float:
    """Share of images without a slope; below 0.1 % is usual, above 1 % gradients are masked. NaN for no images."""
    return float(zero_gradients(view, x, goal, objective).float().mean())


# --- the warnings of AutoAttack -----------------------------------------------------------------------------------
# Each returns lines for a reader, none where nothing is wrong. None of them stops an evaluation.


class AttackWarning(UserWarning):
    """Something about a system, or about an attack's settings, that makes its figure mislead."""


def before_attack(view: View, x: Tensor, goal: Goal, clean: Tensor) -> list[str]:
    """Every warning that can be given before an attack. `clean` are the view's logits of `x`. `DRAWS` queries for
    every image, and one more for the first. Call it with the system frozen."""
    return [
        *class_count(clean, goal.labels),
        *softmax_output(clean),
        *randomness(view, x, goal),
        *gradients_inside(view, x[:1]),
    ]


DRAWS = 5
"""Forwards of the same images that must agree."""


def randomness(view: View, x: Tensor, goal: Goal, draws: int = DRAWS) -> list[str]:
    """`draws` queries for each image: the number of right decisions must not change, nor the direction of the logits
    by more than 1e-4."""
    right, outputs = set(), []
    with torch.no_grad():
        for _ in range(draws):
            logits = view.logits(x)
            right.add(int((logits.argmax(1) == goal.labels).sum()))
            outputs.append(logits / (logits.norm(dim=1, keepdim=True) + 1e-10))
    apart = max(float((one - other).norm(dim=1).max()) for one, other in combinations(outputs, 2))
    if len(right) == 1 and apart <= 1e-4:
        return []
    return ["the system answers the same image differently each time: average gradients over draws (EOT), since "
            "attacks on a single draw overestimate its robustness"]  # fmt: skip


def softmax_output(logits: Tensor) -> list[str]:
    """Rows within [0, 1] that sum to 1 within 1e-5 are probabilities, not logits."""
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    if not inside or float((logits.sum(1) - 1).abs().max()) >= 1e-5:
        return []
    return ["the system answers with probabilities, which flatten the losses: let it return logits"]


def silent_gradients(silent: int, n: int) -> list[str]:
    """`silent` of `n` images had a gradient of zero in every pixel at the start of a run on a DLR."""
    if not silent:
        return []
    return [f"{silent} of {n} images have an input gradient of zero in every pixel: gradients are masked"]


def square_improves(before: int, after: int, n: int) -> list[str]:
    """`before` and `after` of `n` images stood before and after Square, which comes after the white-box attacks."""
    if before - after <= 0.002 * n:
        return []
    return [f"Square, which sees no gradient, felled {before - after} of {before} images that the white-box attacks "
            f"had left ({n} in all): gradients are probably masked"]  # fmt: skip


def gradients_inside(view: View, x: Tensor) -> list[str]:
    """Whether a forward of `x` takes gradients itself. One query for each image."""
    taken = False
    ours = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal taken
        taken = taken or (event == "call" and frame.f_code in ours)

    earlier = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            view.logits(x)
    finally:
        sys.setprofile(earlier)
    if not taken:
        return []
    return ["the system takes gradients in its forward pass (it optimises at test time): only attacks adapted to "
            "that say how robust it is"]  # fmt: skip


def class_count(logits: Tensor, labels: Tensor) -> list[str]:
    """Labels must have an output; the DLR needs 3 classes, and 4 towards a target."""
    lines, classes = [], logits.shape[1]
    if len(labels) and int(labels.max()) >= classes:
        lines.append(f"label {int(labels.max())} has no output: the system has {classes}")
    if classes < 3:
        lines.append(f"with {classes} classes there is no DLR: targeted runs climb z_t - z_y instead")
    elif classes < 4:
        lines.append("with 3 classes there is no targeted DLR: targeted runs climb z_t - z_y instead")
    return lines
