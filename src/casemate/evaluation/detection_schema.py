"""The `detect` section of params.yaml: the detectors behind a row, and the experiment they are judged by.

No torch is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from casemate import registry
from casemate.errors import near
from casemate.evaluation.schema import AttackParams, CellName, Section, ThreatParams
from casemate.fields import Count, Real, Text

Images = Count | Literal["all"]


class DetectorParams(Section):
    """A registered detector and its options."""

    method: Text
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> DetectorParams:
        registry.check("detector", self.method, self.options)
        return self


class DetectedAttack(AttackParams):
    """An attack on the classifier alone: detectors are fitted to what it makes, and judged on it."""

    threat: ThreatParams | None = None
    """Another threat model than the profile's. What an attack makes outside of it is projected onto it."""

    @model_validator(mode="after")
    def _alone(self) -> DetectedAttack:
        if self.binds is not None:
            raise ValueError(f"{self.attack} needs a source or fitted weights, and gets none here")
        if self.attack == "joint":
            raise ValueError("the attack on a detector is `adaptive`; those here are on the classifier alone")
        return self


class AdaptiveParams(Section):
    """The attack that knows the detector, `joint`, on each detector that could be deployed."""

    options: dict[str, Any] = Field(default_factory=dict)
    images: Count = 100
    """At most so many, of set II."""

    @model_validator(mode="after")
    def _known(self) -> AdaptiveParams:
        registry.check("attack", "joint", self.options)
        return self


def _usual() -> dict[str, DetectedAttack]:
    """The ER paper's attacks (steps of 0.01 at linf 0.3), but for its C&W, which needs a radius of its own in l2."""
    pgd = DetectedAttack(attack="pgd", options={"steps": 40, "relative_step": 1 / 30, "keep": "last"})
    return {"fgsm": DetectedAttack(attack="fgsm"), "pgd": pgd}


class DetectParams(Section):
    """What stands behind one row, and how it is judged: test images are cut into set I, which fits, and set II."""

    detectors: dict[CellName, DetectorParams] = Field(min_length=1)
    attacks: dict[CellName, DetectedAttack] = Field(default_factory=_usual, min_length=1)
    """By default FGSM and all 40 steps of PGD, at the profile's threat model."""
    images: Images = 1000
    """Test images, from the front of the evaluation's order."""
    train_images: Images = 10000
    """Training images that densities and references are taken from."""
    share: Annotated[Real, Field(gt=0, lt=1)] = 0.2
    """Of the test images, for set I."""
    splits: Count = 1
    """Repetitions with other sets I and II, for error bars."""
    adaptive: AdaptiveParams | None = AdaptiveParams()
    fit_to: CellName | None = None
    """The attack that the stored detectors are fitted to, on validation images; by default the first."""

    @model_validator(mode="after")
    def _consistent(self) -> DetectParams:
        if self.fit_to is not None and self.fit_to not in self.attacks:
            raise ValueError(f"fit_to: no attack {self.fit_to!r}{near(self.fit_to, self.attacks)}")
        return self

    @property
    def fitted_to(self) -> str:
        """The attack that the stored detectors are fitted to."""
        return self.fit_to or next(iter(self.attacks))
