"""The `evaluate` section of params.yaml. No torch is imported here."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from casemate import registry
from casemate.errors import near
from casemate.fields import Count, Natural, Positive, Radius, Text, Unit, check_radius

CellName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
View = Literal["adaptive", "static", "both"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ThreatParams(Section):
    norm: Literal["linf", "l2"]
    radius: Positive

    @model_validator(mode="after")
    def _within_pixels(self) -> ThreatParams:
        check_radius(self.norm, self.radius)
        return self


class AttackParams(Section):
    """A registered attack and its options."""

    attack: Text
    options: dict[str, Any] = {}
    search: Literal["fp32", "bf16"] = "fp32"
    """bf16 may save time where the hardware has it (of the time on LeNet-5 it took 0.89 for PGD-10, 0.97 for
    AutoAttack); whatever it finds is decided, and finished, in float32."""

    @model_validator(mode="after")
    def _known(self) -> AttackParams:
        registry.check("attack", self.attack, self.options)
        if self.search == "bf16" and self._own_budget:
            raise ValueError(f"search: bf16 cannot be finished in the ball, as {self.attack} has a budget of its own")
        return self

    @property
    def _own_budget(self) -> bool:
        """Whether the attack declares another budget than the threat model it is given."""
        found = registry.method("attack", self.attack, "budget")
        elsewhere = found is not None and found[0] != "casemate.attacks.base"
        return elsewhere or registry.declared("attack", self.attack, "minimum_norm") is True

    @property
    def binds(self) -> str | None:
        """What the attack needs besides the victim: a "source", "weights" fitted to the victim, or nothing."""
        learned = self.attack in registry.TABLES["learned_attack"]
        found: str | None = "weights" if learned else registry.declared("attack", self.attack, "binds")
        return found

    def check_norm(self, norm: str) -> None:
        """Raises ValueError if the attack does not work in this norm."""
        learned = self.attack in registry.TABLES["learned_attack"]
        norms = registry.declared("learned_attack" if learned else "attack", self.attack, "norms")
        if norms is not None and norm not in norms:
            raise ValueError(f"attack {self.attack} works in {' and '.join(sorted(norms))}, not in {norm}")


class CellParams(AttackParams):
    """One attack of a suite."""

    view: View = "both"
    """Which faces of a system that changes its inference are attacked; for any other they are one and the same."""
    threat: ThreatParams | None = None
    """Another threat model than the profile's; its images count in the worst case only where that contains them."""
    target: Natural | None = None
    """Aim at a class: the number of a draw of one class for each label (`attacks.aimed`). By default away from the
    label. Not for a generator that was fitted without a class to aim at."""

    @model_validator(mode="after")
    def _aimed(self) -> CellParams:
        if self.target is not None and registry.declared("attack", self.attack, "aimable") is False:
            raise ValueError(
                f"target: {self.attack} is one pass of a fitted generator, and cannot be aimed at a class"
            )
        return self


class Suite(Section):
    images: Count | Literal["all"] = "all"
    """How many test images, taken from the front of the one fixed order that every attack and model shares."""
    attacks: dict[CellName, CellParams] = Field(min_length=1)


class Sweep(AttackParams):
    """Accuracy against radius, at the profile's norm."""

    radii: tuple[Radius, ...] = Field(min_length=1)
    images: Count = 1000

    @field_validator("radii")
    @classmethod
    def _rising(cls, radii: tuple[float, ...]) -> tuple[float, ...]:
        if any(b <= a for a, b in pairwise(radii)):
            raise ValueError("radii must rise, each greater than the one before")
        return radii


class Floor(Section):
    """What some rows must keep: the worst case of a suite. A row that keeps less is called failed, with this as the
    reason, and is neither ranked nor champion."""

    rows: list[Text] = Field(min_length=1)
    suite: CellName
    accuracy: Unit


class Selection(Section):
    """What chooses the champion: a suite on images of the validation split, so that the figures of the test images
    are none that it was chosen by."""

    suite: CellName | None = None
    """By default the first."""
    images: Count = 1000
    """How many validation images at most; never more than the suite attacks test images, nor than there are."""


class GateParams(Section):
    """What the masking gate runs beside the suites."""

    images: Count = 1000
    fewer_steps: Count = 10
    steps: Count = 40
    """PGD with `steps` must not be weaker than with `fewer_steps`, nor than FGSM."""
    restarts: Count = 10
    """Starts of PGD with `fewer_steps` that are compared with one; 1 leaves this check out."""
    losses: bool = True
    """Whether APGD of `steps` by cross-entropy is compared with margin and DLR."""
    unbounded_steps: Count = 100
    """Steps of PGD at linf 0.5, where every image can become mid-grey."""
    unbounded_restarts: Count = 1
    curvature: Natural = 100
    """Images whose loss is asked how sharply it bends (`evaluation.curvature`): a figure, and no check; 0 leaves it
    out."""
    corners: Natural = 100
    """Random corners of the ball tried on each image; 0 leaves this check out."""


class EvaluateParams(Section):
    models: list[Text] = []
    """Rows to evaluate."""
    source: Text | None = None
    """The row whose classifier transfer attacks are crafted on."""
    chunk: Count = 500
    """Images of a segment of the ledger: an attack's batch, and what a killed run loses at most."""
    subset: Natural = 1000
    """Images whose adversarial versions are kept (adversarial.npz)."""
    secondary_images: Count = 1000
    """At most so many images for the inference modes of a defense that are not its primary one."""
    suites: dict[CellName, Suite] = Field(min_length=1)
    fit_limit: Unit = 0.05
    """An attack that learns counts as fitted if, fitted to an undefended model with the same settings, it leaves less
    than this share of its images; 0.25 is meant for CIFAR-10."""
    procedures: CellName | None = None
    """The suite in which a system's own adaptive procedures run; by default that of the fewest images."""
    sweep: Sweep | None = None
    gate: GateParams | None = GateParams()
    floors: list[Floor] = []
    selection: Selection | None = Selection()
    """None: the champion is chosen by the test figures, and said to be."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateParams:
        if "all" in self.suites:
            raise ValueError("suites.all: this name stands for the union of every suite; choose another")
        if self.procedures is not None and self.procedures not in self.suites:
            raise ValueError(f"procedures: no suite {self.procedures!r}{near(self.procedures, self.suites)}")
        chosen = self.selection.suite if self.selection else None
        if chosen is not None and chosen not in self.suites:
            raise ValueError(f"selection: no suite {chosen!r}{near(chosen, self.suites)}")
        for floor in self.floors:
            if floor.suite not in self.suites:
                raise ValueError(f"floors: no suite {floor.suite!r}{near(floor.suite, self.suites)}")
        for suite, content in self.suites.items():
            for name, cell in content.attacks.items():
                if cell.binds == "source" and self.source is None:
                    raise ValueError(f"suites.{suite}.attacks.{name}: {cell.attack} needs evaluate.source")
        return self
