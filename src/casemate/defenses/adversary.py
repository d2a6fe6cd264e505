"""What defenses have in common whose adversary is a network that learns beside the classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import nn

from casemate.attacks.learned import LearnedAttack
from casemate.defenses.base import Defense
from casemate.errors import UserError
from casemate.fields import Unit, spec
from casemate.threat import Norm, ThreatModel
from casemate.trainable import Context, Task, depends

NARROWEST = 1e-12
"""Smallest radius: a density needs a ball to live in. Added to a grey level above 0 it is rounded away in float32."""


@spec
class Ramped:
    """A radius that grows."""

    ramp: Unit = 0.0
    """Share of the budget over which the radius grows linearly from 0. Small networks at a large radius need it."""

    def threat(self, ctx: Context) -> ThreatModel:
        """The threat model at this fraction of the budget."""
        share = depends(ctx.fraction, lambda at: min(1.0, at / self.ramp)) if self.ramp else 1.0
        return replace(ctx.threat, radius=max(share * ctx.threat.radius, NARROWEST))


@spec
class AdversaryDefense(Ramped, LearnedAttack, Defense):
    """A defense with the options of the learned attack that is its adversary, and a classifier that learns back.

    The attack's networks are saved beside the classifier, which is deployed alone.
    """

    batch_coupled: ClassVar[bool] = True  # by the generator's batch norm

    def modules(self, task: Task) -> dict[str, nn.Module]:
        require_norm(type(self).__name__, self.norms, task.threat)
        return {"classifier": task.network(), **self.build(task.input_shape, task.num_classes)}

    def victim(self, ctx: Context) -> nn.Module:
        """The classifier of this very run; crafting puts it in the mode that the paper crafts in."""
        return ctx.modules["classifier"]


def require_norm(defense: str, norms: frozenset[Norm], threat: ThreatModel) -> None:
    """Raise UserError unless the defense knows this norm."""
    if threat.norm not in norms:
        raise UserError(f"defense {defense} works in {' and '.join(sorted(norms))}, not in {threat.norm}")
