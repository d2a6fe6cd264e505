"""The projected gradient attacks, each a plan for the one loop: FGSM, PGD, MIM and C&W on the margin.

With the view `adaptive` of a system that purifies its input they are the identity-backward (BPDA) attacks on it
(Athalye et al. 2018), because that view's gradient is taken at the purified image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from casemate.attacks.engine import Plan, ProjectedAscent, momentum
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, spec
from casemate.objectives import capped_margin, objective
from casemate.threat import ThreatModel


@spec
class FGSM(ProjectedAscent):
    """One signed step (Goodfellow et al. 2015); with `random_start` R-FGSM, which is another attack."""

    relative_step: Positive = 1.0
    """Step size over radius."""
    random_start: Flag = False
    objective: Literal["ce", "margin"] = "ce"

    def plan(self, threat: ThreatModel) -> Plan:
        size = self.relative_step * threat.radius
        return Plan(objective(self.objective), 1, size, random_start=self.random_start)


@spec
class Iterative(ProjectedAscent):
    """What the iterative attacks have in common."""

    usual_step: ClassVar[float | None] = None

    steps: Count = 20
    step_size: Positive | None = None
    """In pixel units."""
    relative_step: Positive | None = None
    """Step size over radius. With neither, `usual_step`, else 2.5 / steps: enough to cross the ball."""
    restarts: Count = 1
    """Runs from fresh noise, each on the images that still stand."""
    random_start: Flag = True
    keep: Literal["best", "last"] = "best"
    """The first success, else the last iterate; or always the last iterate, as several papers' code does."""
    check_every: Count = 1
    """Steps between two looks at which images have fallen; larger saves waiting for a GPU, never changes a result."""

    def __post_init__(self) -> None:
        if self.step_size is not None and self.relative_step is not None:
            raise UserError(f"{type(self).__name__}: give step_size or relative_step, not both")
        if self.restarts > 1 and not self.random_start:
            raise UserError(f"{type(self).__name__}: restarts without random_start would repeat one run")

    def size(self, threat: ThreatModel) -> float:
        """The step size in pixel units."""
        if self.step_size is not None:
            return self.step_size
        return threat.radius * (self.relative_step or self.usual_step or 2.5 / self.steps)


@spec
class PGD(Iterative):
    """Projected gradient descent (Madry et al. 2018): sign steps in linf, normalised gradients in l2."""

    objective: Literal["ce", "margin"] = "ce"

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            objective(self.objective), self.steps, self.size(threat), self.restarts, self.random_start,
            self.keep, self.check_every,
        )  # fmt: skip


@spec
class MIM(Iterative):
    """Momentum iterative method (Dong et al. 2018), by default with ADT's settings and random start.

    For transfer its authors use no random start and steps of radius / 10.
    """

    usual_step: ClassVar[float | None] = 0.25

    decay: NonNegative = 1.0
    objective: Literal["ce", "margin"] = "ce"

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            objective(self.objective), self.steps, self.size(threat), self.restarts, self.random_start,
            self.keep, self.check_every, momentum(self.decay),
        )  # fmt: skip


@spec
class CWMargin(Iterative):
    """PGD on the loss of Carlini & Wagner (2017), -max(z_y - max_other + kappa, 0): "CW" of the linf tables.

    A large `kappa` keeps the hinge open; with 0 an image stops moving as soon as it is misclassified.
    """

    steps: Count = 30
    kappa: NonNegative = 50.0

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            capped_margin(self.kappa), self.steps, self.size(threat), self.restarts, self.random_start,
            self.keep, self.check_every,
        )  # fmt: skip
