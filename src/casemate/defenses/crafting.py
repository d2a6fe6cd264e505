"""How defenses craft adversarial examples inside a training step: module modes, and the schedule of the ascent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.attacks.ascent import ascend, l2_step, sign_step
from casemate.defenses.folding import folded
from casemate.errors import UserError
from casemate.fields import Count, Positive, Unit, spec
from casemate.threat import ThreatModel
from casemate.trainable import depends

BatchNormMode = Literal["eval", "train", "train_update"]


@contextmanager
def crafting(*modules: nn.Module, bn: BatchNormMode = "eval") -> Iterator[None]:
    """While open: no parameter needs a gradient, and every module is in the mode that the paper crafts in.

    "eval" uses the running statistics; "train" those of the batch, and keeps the running ones untouched;
    "train_update" is plain train mode, each forward pass moving the running statistics. Train modes switch
    dropout on, too. Flags and modes are put back as they were. In "eval" mode batch norms are folded where the recipe
    says so (see `casemate.defenses.folding`).
    """
    parameters = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    parts = [(part, part.training) for m in modules for part in m.modules()]
    norms = [(part, part.track_running_stats) for part, _ in parts if isinstance(part, _BatchNorm)]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for part, _ in parts:
            part.training = bn != "eval"
        if bn == "train":
            for norm, _ in norms:
                norm.track_running_stats = False
        with folded(*modules) if bn == "eval" else nullcontext():
            yield
    finally:
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
        for part, training in parts:
            part.training = training
        for norm, tracking in norms:
            norm.track_running_stats = tracking


@dataclass(frozen=True)
class Ascent:
    """What one batch is crafted with: the (ramped) threat model, number of steps, step size in pixel units."""

    threat: ThreatModel
    steps: int
    step_size: float

    def __call__(self, loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor) -> Tensor:
        """Ascend the per-sample `loss` from `start`, in the geometry of the threat model."""
        direction = sign_step if self.threat.norm == "linf" else l2_step
        return ascend(loss, x, start, self.threat, steps=self.steps, step_size=self.step_size, direction=direction)


@spec
class AscentSchedule:
    """Fields of a defense that crafts by projected ascent, and what they come to at a fraction of the budget."""

    steps: Count = 10
    step_size: Positive | None = None
    """In pixel units. Without it the step is `step_factor` x radius / steps, with the ramped radius."""
    step_factor: Positive = 2.5
    """2.5 with 10 steps is the 2/255 of the usual 8/255 recipe."""
    ramp: Unit = 0.0
    """Share of the budget over which the radius grows linearly from 0. Small networks at a large radius need it."""
    plan: tuple[tuple[Unit, Count], ...] = ()
    """Changes of `steps`: pairs (fraction of the budget from which it holds, steps), in ascending order."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.plan]
        if starts != sorted(set(starts)):
            raise UserError(f"plan: the fractions must ascend, not {', '.join(f'{s:g}' for s in starts)}")

    def ascent(self, threat: ThreatModel, fraction: float) -> Ascent:
        """The ascent at a `fraction` of the budget in [0, 1)."""
        return depends(fraction, lambda at: self._ascent(threat, at))

    def _ascent(self, threat: ThreatModel, fraction: float) -> Ascent:
        steps = self.steps
        for start, planned in self.plan:
            if fraction >= start:
                steps = planned
        share = min(1.0, fraction / self.ramp) if self.ramp else 1.0
        ramped = ThreatModel(threat.norm, threat.radius * share)
        size = self.step_factor * ramped.radius / steps if self.step_size is None else self.step_size
        return Ascent(ramped, steps, size)
