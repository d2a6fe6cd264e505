"""Transfer: examples crafted on one system, judged on another."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.engine import Climb, Plan, ProjectedAscent, momentum
from casemate.attacks.gradient import Iterative
from casemate.errors import UserError
from casemate.fields import NonNegative, spec
from casemate.objectives import objective
from casemate.system import Offer, System, View
from casemate.threat import Goal, ThreatModel


@spec
class Transfer(Iterative):
    """Projected ascent on a source system (Papernot et al. 2016): black box, by default one look at the victim.

    Every image is searched to the end, also one that the source has long got wrong, and the iterate of the highest
    objective is kept: a bare success on the source is under-strength on the victim. `decay` 0 is PGD, 1 MIM; one
    step with `relative_step` 1 and no random start FGSM. A source of the victim's own seed and recipe is a white box
    in all but name. The passes it counts are those of the source, its queries those of either.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    binds: ClassVar[Literal["source", "weights"] | None] = "source"
    usual_step: ClassVar[float | None] = 0.25

    keep: Literal["best", "last", "all"] = "best"  # type: ignore[assignment]
    """The iterate of the highest objective, or the last one; or `all`: the victim is asked about every iterate, the
    start included, and an image is done with the first that it gets wrong."""
    objective: Literal["ce", "margin"] = "ce"
    decay: NonNegative = 0.0

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            objective(self.objective), self.steps, self.size(threat), self.restarts, self.random_start,
            "last" if self.keep == "last" else "best", self.check_every, momentum(self.decay),
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
        self._crafted: dict[str, tuple[Tensor, Cost]] | None = None

    def plan(self, threat: ThreatModel) -> Plan:
        return self.transfer.plan(threat)

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        if self.transfer.keep == "all" or self._crafted is None:
            return self._craft(view, x, goal, threat, seed, cost)
        key = _digest(x, goal, threat, seed)
        if key not in self._crafted:
            part = Cost.zero(len(x))
            self._crafted[key] = (self._craft(view, x, goal, threat, seed, part).cpu(), part)
        x_adv, part = self._crafted[key]
        _add(cost, part)
        return x_adv.to(x.device)

    def remembering(self) -> SourcedTransfer:
        """This attack, for a loop over victims: what it crafts is kept in memory and shown to each of them, as long
        as nothing of it depends on the victim. Costs are counted as if it were crafted anew."""
        twin = SourcedTransfer(self.transfer, self.source)
        twin._crafted = {}
        return twin

    def _craft(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        part, face = Cost.zero(len(x)), self._face_of_source(view)
        with self.source.frozen():
            x_adv = Climb(face, x, goal, threat, seed, part, self.plan(threat)).run()
        if self.transfer.keep == "all":  # the victim looked at whatever the source looked at
            part.queries += part.forwards // face.passes[0] + part.queries
        _add(cost, part)
        return x_adv

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        face = self._face_of_source(view)
        forwards, backwards, queries = super().passes(face, n)
        if self.transfer.keep == "all":
            queries += forwards // face.passes[0] + queries
        return forwards, backwards, queries

    def parameters(self) -> dict[str, Any]:
        return {**self.transfer.parameters(), "source": self.source.hash()}

    def _face_of_source(self, victim: View) -> View:
        """Never exact, since what the source decides does not settle what the victim will; unless the victim itself
        is asked at every iterate."""
        face = self.source.views()["adaptive"]
        if self.transfer.keep != "all":
            return replace(face, exact=False)
        return replace(face, exact=True, read=lambda logits, x: victim.decide(x))


def _add(cost: Cost, part: Cost) -> None:
    cost.forwards += part.forwards
    cost.backwards += part.backwards
    cost.queries += part.queries


def _digest(x: Tensor, goal: Goal, threat: ThreatModel, seed: int) -> str:
    digest = hashlib.sha256(f"{threat!r} {seed} {tuple(x.shape)}".encode())
    for tensor in (x, goal.labels, goal.targets):
        digest.update(b"" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
