"""What an attack refuses to start on: each mistake is one line that names the thing and the mend."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from casemate.errors import UserError
from casemate.system import System, View
from casemate.threat import TOLERANCE, Goal, ThreatModel

SUM_TOLERANCE = 1e-4


def checked_images(system: System, x: Tensor) -> Tensor:
    """`x` (N x C x H x W), cut to [0, 1] where rounding left it. Raises UserError for what `system` cannot take."""
    if x.dim() != 4 or tuple(x.shape[1:]) != tuple(system.input_shape):
        wanted = "N x " + " x ".join(map(str, system.input_shape))
        raise UserError(f"{system.name} takes images of shape {wanted}, and got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"images must be floats in [0, 1], and are {_type(x)}: divide bytes by 255")
    if not len(x):
        raise UserError("no images to attack: the batch is empty")
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also where an extremum is NaN
        raise UserError(
            f"images must lie in [0, 1], and go from {low:.6g} to {high:.6g}: scale them to [0, 1], and leave "
            "normalisation to the model"
        )
    return x.detach() if low >= 0 and high <= 1 else x.detach().clamp(0, 1)


def check_goal(goal: Goal, n: int, classes: int) -> None:
    """Labels, and targets where there are any, must be `n` whole numbers in [0, classes)."""
    for name, values in (("labels", goal.labels), ("targets", goal.targets)):
        if values is None:
            continue
        if values.dtype != torch.long or tuple(values.shape) != (n,):
            raise UserError(f"{name} must be {n} int64 numbers, one for each image: got {_type(values)} of shape "
                            f"{tuple(values.shape)}")  # fmt: skip
        outside = (values < 0) | (values >= classes)
        if bool(outside.any()):
            raise UserError(f"{name} must lie in 0 to {classes - 1}: found {int(values[outside][0])}")


def check_threat(name: str, norms: frozenset[str], threat: ThreatModel) -> None:
    """The radius must be above 0, and the norm one that attack `name` knows."""
    if threat.norm not in norms:
        raise UserError(f"attack {name} works in {' and '.join(sorted(norms))}, not in {threat.norm}")
    if not (threat.radius > 0 and math.isfinite(threat.radius)):
        raise UserError(f"the radius must be above 0, and is {threat.radius}")


def watched(view: View, system: System) -> View:
    """`view`, whose first answer is looked at: numbers for every class, finite, and no probabilities."""
    seen = False

    def logits(x: Tensor) -> Tensor:
        nonlocal seen
        out = view.logits(x)
        if not seen:
            _check_logits(out.detach(), len(x), system)
            seen = True
        return out

    return replace(view, logits=logits)


def _check_logits(out: Tensor, n: int, system: System) -> None:
    if tuple(out.shape) != (n, system.num_classes):
        raise UserError(f"{system.name} must answer with logits {(n, system.num_classes)}, not {tuple(out.shape)}")
    if not bool(out.isfinite().all()):
        raise UserError(f"{system.name} answers with infinite or undefined logits: no attack can climb them")
    shares = bool(((out >= 0) & (out <= 1)).all()) and bool(((out > 0) & (out < 1)).any())
    if shares and bool(((out.sum(1) - 1).abs() < SUM_TOLERANCE).all()):
        raise UserError(
            f"{system.name} answers with probabilities, whose gradients vanish where it is sure: leave out its "
            "softmax, or take the logarithm"
        )


def _type(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")
