"""Any attack, aimed at a class instead of merely away from the label."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost, Shown
from casemate.errors import UserError
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, ThreatModel, targeted


def targets_of(labels: np.ndarray, num_classes: int, draw: int) -> np.ndarray:
    """(N,) a class other than the label for each of `labels`: uniform over the others, and the same one for the same
    label, number of classes and `draw`, whatever images it stands beside."""
    steps = torch.randint(1, num_classes, (num_classes,), generator=generator("targets", draw, num_classes)).numpy()
    labels = np.asarray(labels)
    found: np.ndarray = (labels + steps[labels]) % num_classes
    return found


class Aimed(Attack):
    """`inner` with the goal of `targets_of`: `target: 0` beside an attack in params.yaml. A picture counts as fallen
    if its label is lost, at whatever class; the study counts those that end at their target."""

    def __init__(self, inner: Attack, draw: int) -> None:
        if inner.binds is not None:
            raise UserError(f"{type(inner).__name__} needs its {inner.binds} before it can be aimed")
        if not inner.aimable:
            raise UserError(f"{type(inner).__name__} was fitted without a class to aim at")
        self.inner, self.draw = inner, draw
        self.needs, self.norms, self.published = inner.needs, inner.norms, inner.published  # type: ignore[misc]
        self.minimum_norm, self.reads_layers = inner.minimum_norm, inner.reads_layers  # type: ignore[misc]

    @property
    def upper_bound(self) -> bool:
        return self.inner.upper_bound

    def accept(self, threat: ThreatModel) -> None:
        self.inner.accept(threat)

    def budget(self, threat: ThreatModel) -> Any:
        return self.inner.budget(threat)

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor | Shown:
        classes = view.system.num_classes if view.system is not None else int(view.logits(x[:1]).shape[1])
        aims = torch.from_numpy(targets_of(goal.labels.cpu().numpy(), classes, self.draw))
        return self.inner.run(view, x, targeted(goal.labels, aims.to(goal.labels)), threat, seed, cost)

    def parameters(self) -> dict[str, Any]:
        kind = type(self.inner)
        return {"inner": f"{kind.__module__}:{kind.__qualname__}", **self.inner.parameters(), "target": self.draw}

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return self.inner.passes(view, n)
