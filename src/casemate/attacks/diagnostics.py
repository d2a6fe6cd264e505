"""Signs that an attack cannot see a slope (Carlini et al. 2019, section 4; the masking gate asks for them)."""

from __future__ import annotations

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
