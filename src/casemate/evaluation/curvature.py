"""How sharply the loss bends around an image: the dominant eigenvalue of its Hessian with respect to the input.

Adversarial training flattens the loss (Dong et al. 2020, figure 2f); a surface of needles or of plateaus is a sign of
masked gradients. Two ways to the same number: power iteration on any differentiable system, and, where the logits are
piecewise linear in the image (ReLU networks in eval mode), an eigenproblem of one row and column a class. Pixel units
of [0, 1]: with images in [-1, 1] the eigenvalues would be a quarter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.evaluation.ledger import full_precision
from casemate.evaluation.plan import Runner
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.system import System, View
from casemate.threat import Goal

ITERATIONS, TOLERANCE = 50, 1e-3


def by_power_iteration(view: View, x: Tensor, goal: Goal, seed: int = 0) -> Tensor:
    """(N,) the eigenvalue of largest magnitude of each image's Hessian of the cross-entropy.

    `x` is N x C x H x W, of which every image has a start of its own drawn from `seed`. Ends after 50 iterations, or
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


def by_classes(view: View, x: Tensor) -> Tensor:
    """(N,) the largest eigenvalue, exact where the logits are piecewise linear in the image.

    There the Hessian is J^T A J with J the logits' Jacobian and A = diag(p) - p p^T, and shares its eigenvalues but
    for zeros with A^(1/2) J J^T A^(1/2): one backward pass a class, and no iteration. Where activations bend (SiLU),
    it is the Gauss-Newton part of the Hessian. It does not depend on the label.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = view.logits(leaf)
        slopes = [
            torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0].flatten(1)
            for c in range(logits.shape[1])
        ]
    jacobian, p = torch.stack(slopes, dim=1), logits.detach().softmax(1)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(spread)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.mT
    found: Tensor = torch.linalg.eigvalsh(root @ (jacobian @ jacobian.mT) @ root)[:, -1]
    return found


def figures(system: System, runner: Runner, images: int) -> dict[str, Any] | None:
    """{"median", "mean", "n"} over those of the first `images` that the system gets right: of the classifier alone,
    so that a purification does not hide it. Saturated images have next to none, and the two differ widely. None where
    no image is right, or where the logits are noisy.
    """
    face = system.views()["static"]
    if system.stochastic:
        return None
    found = []
    order = runner.order(images)
    with system.frozen(), full_precision():
        for start in range(0, len(order), runner.ledger.chunk):
            x, y = runner.data.take(order[start : start + runner.ledger.chunk])
            right = system.decide(x) == y
            if bool(right.any()):
                found.append(by_classes(face, x[right]).cpu().numpy())
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
