"""The attack contract. The base class is closed: it freezes the victim, enforces the budget, counts the passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor

from casemate.attacks.checks import check_goal, check_threat, checked_images, watched
from casemate.errors import UserError
from casemate.system import Offer, System, View
from casemate.threat import Goal, Norm, ThreatModel

if TYPE_CHECKING:
    from casemate.attacks.learned import LearnedAttack
    from casemate.networks.base import Shape


@dataclass
class Cost:
    """Passes spent on each image: (N,) long tensors.

    Forwards and backwards are those of the classifier, so a pass through a purified system counts for several. A
    query is one call without a gradient, whatever the system does for it.
    """

    forwards: Tensor
    backwards: Tensor
    queries: Tensor

    @classmethod
    def zero(cls, n: int) -> Cost:
        return cls(*(torch.zeros(n, dtype=torch.long) for _ in range(3)))


@dataclass(frozen=True)
class AttackResult:
    """`x_adv` lies in the budget; `success` (N,) bool is the system's own decision on it; `prediction` (N,) long.

    Of a minimum-norm attack a success counts only inside the threat model; `prediction` tells it beyond.
    """

    x_adv: Tensor
    success: Tensor
    prediction: Tensor
    cost: Cost
    witness: Tensor | None = None
    """What made the images, where the budget is no ball around them (see `Shown`)."""


@dataclass(frozen=True)
class Shown:
    """Images with what made them (a flow, a rotation, a transport plan), one row for each: what a budget outside lp
    balls is checked by. A row of zeros must stand for the clean image."""

    x_adv: Tensor
    witness: Tensor | None

    def clean_where(self, wrong: Tensor, x: Tensor) -> Shown:
        """With the clean images `x` where `wrong` (N,) is true."""
        x_adv, witness = torch.where(wrong.view(-1, 1, 1, 1), x, self.x_adv), self.witness
        if witness is not None:
            witness = witness.masked_fill(wrong.view(-1, *[1] * (witness.dim() - 1)), 0)
        return Shown(x_adv, witness)

    def inside(self, budget: Any, x: Tensor) -> Tensor:
        """(N,) bool: what the budget says of them."""
        given = (self.x_adv, x) if self.witness is None else (self.x_adv, x, self.witness)
        inside: Tensor = budget.contains(*given)
        return inside


class Attack(ABC):
    """Base of every attack: a `@spec` class with its parameters as fields.

    `attack(system, x, goal, threat, seed)` is all a caller needs; subclasses implement `run` and `passes`.

    An attack that needs more than the victim says so in `binds` and is called through the attack that binding it
    returns: `Transfer().with_source(system)` crafts on that system, `GAP().with_weights(...)` uses weights fitted to
    this victim. What is bound takes part in `parameters()` by its hash.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"gradient"})
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2"})
    """The threat models it can work in."""
    minimum_norm: ClassVar[bool] = False
    """True if the search has no radius: its budget is the box, and it succeeds where the distance is small enough."""
    binds: ClassVar[Literal["source", "weights"] | None] = None
    aimable: ClassVar[bool] = True
    """False of one pass of a generator that was fitted without a class to aim at: `target` is refused beside it."""
    reads_layers: ClassVar[bool] = False
    """True if it reads layers of the classifier while they run: where memory is short, its batch cannot be cut."""
    published: ClassVar[bool] = False
    """True for a paper's own evaluation of its defense, kept to show what that reports."""

    @final
    def __call__(
        self,
        system: System,
        x: Tensor,
        goal: Goal,
        threat: ThreatModel,
        seed: int = 0,
        *,
        view: str = "adaptive",
        clean: Tensor | None = None,
    ) -> AttackResult:
        """Attack images `x` (N x C x H x W in [0, 1]).

        Exactly one forward of the whole system is added to what the method costs: the verification of the
        result, by `system.decide`. `clean` are the system's decisions (N,) on `x`, where the caller has them: an
        image that is wrong from the start is then returned as it is. Raises UserError if the system does not offer
        what the attack needs, if something must be bound first, or if the images, the labels, the threat model or
        the system's answers are not what they must be.
        """
        if self.binds is not None:
            raise UserError(f"attack {type(self).__name__} needs its {self.binds}: call with_{self.binds} first")
        x = checked_images(system, x)
        check_goal(goal, len(x), system.num_classes)
        self.accept(threat)
        face = self._face(system, view)
        cost = Cost.zero(len(x))
        with system.frozen():
            with torch.enable_grad():  # the caller may have switched gradients off
                found = self.run(watched(face, system), x, goal, threat, seed, cost)
            shown = found if isinstance(found, Shown) else Shown(found.detach(), None)
            if clean is not None:
                shown = shown.clean_where(goal.reached(clean), x)
            inside = shown.inside(self.budget(threat), x)
            if not bool(inside.all()):
                at = int((~inside).nonzero()[0, 0])
                raise AssertionError(f"{type(self).__name__} left its budget at image {at}")
            x_adv = shown.x_adv
            prediction = system.decide(x_adv)
        forwards, backwards = system.decision_passes()
        cost.forwards += forwards
        cost.backwards += backwards
        success = goal.reached(prediction)
        if self.minimum_norm:
            success &= threat.contains(x_adv, x)
        return AttackResult(x_adv, success, prediction, cost, shown.witness)

    @abstractmethod
    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor | Shown:
        """The method: adversarial images inside the budget. Adds its passes to `cost`."""

    def budget(self, threat: ThreatModel) -> Any:
        """What `x_adv` must stay within: the threat model, unless the attack declares its own.

        An own one has `contains(x_adv, x) -> (N,) bool`, or `contains(x_adv, x, witness)` where `run` returns
        `Shown`; `norm` and `radius` (None without a limit); and its text is what the report names. Its images count
        in the worst case of a threat model only where that contains them.
        """
        return ThreatModel("linf", 1.0) if self.minimum_norm else threat

    @property
    def upper_bound(self) -> bool:
        """True of an attack cut short: its figure is labelled an upper bound, whatever runs beside it."""
        return False

    def accept(self, threat: ThreatModel) -> None:
        """Raises UserError for a threat model that it cannot work in."""
        check_threat(type(self).__name__, self.norms, threat)

    def parameters(self) -> dict[str, Any]:
        """Everything that identifies the attack, JSON-able: part of its hash in the ledger."""
        from dataclasses import asdict

        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        """An upper bound on what `run` adds to `Cost` (forwards, backwards, queries), summed over n images."""
        raise NotImplementedError

    def with_source(self, source: System) -> Attack:
        """This attack with its examples crafted on `source`."""
        raise UserError(f"attack {type(self).__name__} has no source system")

    def with_weights(
        self, fitted: LearnedAttack, weights: dict[str, Tensor], *, input_shape: Shape, num_classes: int
    ) -> Attack:
        """This attack with the weights of `fitted`, by "module.parameter" names."""
        raise UserError(f"attack {type(self).__name__} has no weights")

    def _face(self, system: System, view: str) -> View:
        """The view that is attacked. One whose answers are noisy has its own `decisions`, by draws of its own."""
        missing = self.needs - system.offers
        if missing:
            raise UserError(
                f"attack {type(self).__name__} needs {', '.join(sorted(missing))}, "
                f"and {system.name} offers only {', '.join(sorted(system.offers))}"
            )
        views = system.views()
        if view not in views:
            raise UserError(f"{system.name} has no view {view!r}; views: {', '.join(views)}")
        return replace(views[view], decisions=views[view].decisions or system.decide, system=system)
