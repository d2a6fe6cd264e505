"""Projected gradient ascent, bare: what training methods craft with, and the steps the evaluation engine shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from casemate.threat import ThreatModel


def sign_step(gradient: Tensor) -> Tensor:
    """Steepest ascent in linf: the sign, in which zero stays zero."""
    return gradient.sign()


def l2_step(gradient: Tensor) -> Tensor:
    """Steepest ascent in l2: each sample scaled to norm 1, however small it is (zero stays zero)."""
    unit = gradient / per_sample(gradient.flatten(1).abs().amax(1), gradient)
    step: Tensor = unit / per_sample(unit.flatten(1).norm(dim=1), unit)
    return step


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N,) divisors, zero replaced by the smallest normal number, shaped to broadcast over `like` (N x ...)."""
    return values.clamp_min(torch.finfo(values.dtype).tiny).view(-1, *[1] * (like.dim() - 1))


def projector(x: Tensor, threat: ThreatModel) -> Callable[[Tensor], Tensor]:
    """`project(x_adv)` onto the ball around `x` cut to [0, 1]; in place where it can be, so use what it returns.

    The linf bounds are computed once, here. `x` (N x C x H x W) must lie in [0, 1].
    """
    if threat.norm == "linf":
        low, high = (x - threat.radius).clamp_(min=0.0), (x + threat.radius).clamp_(max=1.0)

        def clip(x_adv: Tensor) -> Tensor:
            torch.maximum(x_adv, low, out=x_adv)
            return torch.minimum(x_adv, high, out=x_adv)

        return clip
    return lambda x_adv: threat.project(x_adv, x)


def ascend(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    direction: Callable[[Tensor], Tensor] = sign_step,
) -> Tensor:
    """`steps` times: x_adv <- project(x_adv + step_size * direction(d loss / d x_adv)). Costs `steps` passes.

    Args:
        loss: per-sample values (N,) to maximise at given images; they are summed, so a batch mean would be wrong.
        x: clean images N x C x H x W in [0, 1], float32; the centre of the ball.
        start: the first iterate, used as it is: it may lie outside the ball or the box, as in several papers.
        threat: ball to project on after every step.
        step_size: in pixel units.
        direction: what becomes of the gradient; `sign_step` or `l2_step`.

    Only the input receives a gradient: no parameter is touched or paid for, and modes are left as the caller set
    them. Returns the last iterate, detached; with `steps=0` the projected start.
    """
    project = projector(x.detach(), threat)
    x_adv = start.detach().clone()
    if steps == 0:
        return project(x_adv)
    for _ in range(steps):
        with torch.enable_grad():
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(x_adv).sum(), x_adv)
        x_adv = project(x_adv.detach().add_(direction(gradient), alpha=step_size))
    return x_adv
