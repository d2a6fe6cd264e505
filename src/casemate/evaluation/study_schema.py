"""The `study` section of params.yaml: what is told of attacks beyond the leaderboard. No torch is imported here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from casemate.errors import near
from casemate.evaluation.schema import CellName, EvaluateParams, Section
from casemate.fields import Count, Natural, NonNegative, Positive, Text


class AblationParams(Section):
    """An option over its values: cells of the suites that differ in it, or rows that were trained with it."""

    cells: dict[NonNegative, CellName] = Field(default_factory=dict)
    """Value -> the attack with that value; on every model of the study."""
    rows: dict[NonNegative, Text] = Field(default_factory=dict)
    """Value -> the row trained with that value; under every attack of the study's suites."""

    @model_validator(mode="after")
    def _one(self) -> AblationParams:
        if bool(self.cells) == bool(self.rows):
            raise ValueError("an ablation is over cells or over rows: give one of them")
        return self


class TransferParams(Section):
    """A transfer matrix: what is left of each victim on PGD examples that were crafted on each source."""

    sources: list[Text] = Field(default_factory=list)
    """Evaluated rows; with none there is no matrix. Examples are crafted through all that a row does at inference."""
    ensembles: dict[CellName, list[Text]] = Field(default_factory=dict)
    """More sources: the mean of the probabilities of some of `sources`, by a name of its own."""
    victims: list[Text] = Field(default_factory=list)
    """Evaluated rows; all of them by default."""
    images: Count = 256
    steps: Count = 20
    relative_step: Positive = 0.25
    """Of the radius."""

    @model_validator(mode="after")
    def _ensembles(self) -> TransferParams:
        for name, members in self.ensembles.items():
            if len(set(members)) < 2 or len(set(members)) < len(members):
                raise ValueError(f"ensembles.{name}: name two different rows or more")
            for member in members:
                if member not in self.sources:
                    raise ValueError(
                        f"ensembles.{name}: {member!r} is none of the sources{near(member, self.sources)}"
                    )
        return self


class StudyParams(Section):
    """Success table, distances, ablations and pictures, out of the cells that the evaluate stage ran. Only images
    whose adversarial versions are kept (`evaluate.subset`) take part."""

    models: list[Text] = Field(default_factory=list)
    """Evaluated rows; with none the study has nothing but its transfer matrix."""
    suites: list[CellName] = Field(default_factory=list)
    """Suites whose attacks are the columns; all of them by default."""
    protocol: Literal["digits", "mnist", "cifar", "imagenet"] = "imagenet"
    """Windows of the internal Wasserstein distance (`casemate.iwd.PROTOCOLS`)."""
    images: Count = 20
    """Successes of each attack whose distances are measured: at ImageNet's size a second or more for each."""
    oracle: Text | None = None
    """A row that nothing attacks: what it says of an adversarial image tells whether its label is left."""
    ablations: dict[CellName, AblationParams] = Field(default_factory=dict)
    """By the option's name."""
    pictures: Natural = 6
    """Images of the contact sheets."""
    strips: list[CellName] = Field(default_factory=list)
    """Attacks whose first success is shown scale by scale."""
    transfer: TransferParams = TransferParams()

    def check(self, evaluate: EvaluateParams, rows: list[str]) -> None:
        """Raise ValueError with the path of what does not exist."""
        cells = {cell for suite in evaluate.suites.values() for cell in suite.attacks}
        wanted: list[tuple[str, str, object]] = [("models", model, evaluate.models) for model in self.models]
        wanted += [("suites", suite, evaluate.suites) for suite in self.suites]
        wanted += [("oracle", self.oracle, rows)] if self.oracle is not None else []
        wanted += [("strips", cell, cells) for cell in self.strips]
        wanted += [("transfer.sources", row, evaluate.models) for row in self.transfer.sources]
        wanted += [("transfer.victims", row, evaluate.models) for row in self.transfer.victims]
        for name in self.transfer.ensembles:
            if name in rows:
                raise ValueError(f"study.transfer.ensembles: {name} is the name of a row, too: choose another")
        for name, ablation in self.ablations.items():
            wanted += [(f"ablations.{name}.cells", cell, cells) for cell in ablation.cells.values()]
            wanted += [(f"ablations.{name}.rows", row, evaluate.models) for row in ablation.rows.values()]
        for where, name, known in wanted:
            if name not in known:  # type: ignore[operator]
                raise ValueError(f"study.{where}: no {name!r} there{near(name, known)}")  # type: ignore[arg-type]
        if self.models and not evaluate.subset:
            raise ValueError("study: it needs adversarial images, and evaluate.subset keeps none")
