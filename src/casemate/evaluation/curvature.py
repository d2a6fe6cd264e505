"""How sharply the loss bends around an image: the dominant eigenvalue of its Hessian with respect to the input.

Adversarial training flattens the loss (Dong et al. 2020, figure 2f); a surface of needles or of plateaus is a sign of
masked gradients. Pixel units of [0, 1]: with images in [-1, 1] the eigenvalues would be a quarter.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.errors import first_line
from casemate.evaluation.ledger import full_precision
from casemate.evaluation.plan import Runner
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.system import System, View
from casemate.threat import Goal, untargeted

log = logging.getLogger(__name__)

ITERATIONS, TOLERANCE = 30, 1e-3
TOGETHER = 50
"""Images of one power iteration: second derivatives keep the graph of the first."""


def dominant_eigenvalue(view: View, x: Tensor, goal: Goal, seed: int = 0) -> Tensor:
    """(N,) the eigenvalue of largest magnitude of each image's Hessian of the cross-entropy.

    `x` is N x C x H x W, of which every image has a start of its own drawn from `seed`. Ends after 30 iterations, or
    when no value moves by more than a thousandth. Each costs one forward and two backward passes. Call it with the
    system frozen and in eval mode (`with system.frozen():`).
    """
    direction = _unit(torch.randn(x.shape, generator=generator(seed, "curvature")).to(x))
    value = x.new_zeros(len(x))
    for _ in range(ITERATIONS):
        product = _hessian_times(view, x, goal, direction)
        found = (direction * product).flatten(1).sum(1)
        direction = _unit(product)
        moved = (found - value).abs() > TOLERANCE * found.abs()
        value = found
        if not bool(moved.any()):
            break
    return value


def figures(system: System, runner: Runner, images: int) -> dict[str, Any] | None:
    """{"median", "mean", "n"} over those of the first `images` that the system gets right: of the classifier alone,
    so that a purification does not hide it. Saturated images have next to none, and the two differ widely. None where
    no image is right, where the logits are noisy, or, said with the reason, where it cannot be computed: an operator
    without a second derivative, too little memory.
    """
    face = system.views()["static"]
    if system.stochastic:
        return None
    found = []
    order = runner.order(images)
    with system.frozen(), full_precision():
        for start in range(0, len(order), TOGETHER):
            x, y = runner.data.take(order[start : start + TOGETHER])
            right = system.decide(x) == y
            if not bool(right.any()):
                continue
            try:
                found.append(dominant_eigenvalue(face, x[right], untargeted(y[right])).cpu().numpy())
            except RuntimeError as error:
                log.warning("%s: the curvature is left out: %s", system.name, first_line(error))
                return None
    if not found:
        return None
    values = np.concatenate(found)
    return {"median": _figure(np.median(values)), "mean": _figure(values.mean()), "n": len(values)}


def _figure(value: np.floating[Any]) -> float:
    return float(f"{value:.4g}")


def _hessian_times(view: View, x: Tensor, goal: Goal, direction: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        loss = cross_entropy(view.logits(leaf), goal).sum()
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (product,) = torch.autograd.grad((slope * direction).sum(), leaf)
    return product


def _unit(direction: Tensor) -> Tensor:
    length = direction.flatten(1).norm(dim=1).clamp(min=torch.finfo(direction.dtype).tiny)
    unit: Tensor = direction / length.view(-1, *[1] * (direction.dim() - 1))
    return unit
