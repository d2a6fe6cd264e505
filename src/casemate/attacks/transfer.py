"""Transfer: examples crafted on one system, judged on another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.engine import Plan, ProjectedAscent, momentum
from casemate.attacks.gradient import Iterative
from casemate.errors import UserError
from casemate.fields import NonNegative, spec
from casemate.objectives import objective
from casemate.system import Offer, System, View
from casemate.threat import Goal, ThreatModel


@spec
class Transfer(Iterative):
    """Projected ascent on a source system (Papernot et al. 2016): black box, one look at the victim.

    Every image is searched to the end, also one that the source has long got wrong, and the iterate of the highest
    objective is kept: a bare success on the source is under-strength on the victim. `decay` 0 is PGD, 1 MIM; one
    step with `relative_step` 1 and no random start FGSM. A source of the victim's own seed and recipe is a white box
    in all but name. The passes it counts are those of the source.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    binds: ClassVar[Literal["source", "weights"] | None] = "source"
    usual_step: ClassVar[float | None] = 0.25

    objective: Literal["ce", "margin"] = "ce"
    decay: NonNegative = 0.0

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            objective(self.objective), self.steps, self.size(threat), self.restarts, self.random_start,
            self.keep, self.check_every, momentum(self.decay),
        )  # fmt: skip

    def with_source(self, source: System) -> Attack:
        if "gradient" not in source.offers:
            raise UserError(f"attack Transfer needs gradients of its source, and {source.name} offers none")
        return SourcedTransfer(self, source)


class SourcedTransfer(ProjectedAscent):
    """A `Transfer` with its source."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})

    def __init__(self, transfer: Transfer, source: System) -> None:
        self.transfer, self.source = transfer, source

    def plan(self, threat: ThreatModel) -> Plan:
        return self.transfer.plan(threat)

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        with self.source.frozen():
            return super().run(self._face_of_source(), x, goal, threat, seed, cost)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return super().passes(self._face_of_source(), n)

    def parameters(self) -> dict[str, Any]:
        return {**self.transfer.parameters(), "source": self.source.hash()}

    def _face_of_source(self) -> View:
        """Never exact: what the source decides does not settle what the victim will."""
        return replace(self.source.views()["adaptive"], exact=False)
