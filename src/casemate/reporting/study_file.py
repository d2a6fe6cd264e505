"""What the report reads and shows of the study: `study/study.json`, and the pictures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from casemate.reporting.records import Number, Record, read


class Success(Record):
    """One cell of the success table: `hits` of the `n` images that were right before."""

    asr: Number
    low: Number
    high: Number
    hits: int
    n: int
    images: int
    clean_accuracy: Number
    oracle_agrees: Number = None


class Index(Record):
    """`study/index.json`: the models of the study, none where it is off, and every file beside it."""

    models: tuple[str, ...]
    files: tuple[str, ...] = ()


class StudyFile(Record):
    """`study/study.json`."""

    about: dict[str, Any]
    table: dict[str, dict[str, Success]]
    figures: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[str]:
        """Files to look at."""
        return [name for name in self.files if name.endswith((".png", ".jpg"))]

    @property
    def oracle(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.about.get("oracle")
        return found

    def median(self, row: str, attack: str, distance: str) -> float | None:
        """The median of a distance over an attack's successes; of "iwd", over the mean of its windows' medians."""
        named = {name: found["attacks"].get(attack) for name, found in self.figures.get(row, {}).items()}
        values = [
            found["median"]
            for name, found in named.items()
            if found is not None and found["median"] is not None and name.split(" ")[0] == distance
        ]
        return sum(values) / len(values) if values else None


class Figures(Record):
    """A share of `n` images, with its 95 % interval."""

    accuracy: float
    low: float
    high: float
    n: int


class TransferFile(Record):
    """`study/transfer.json`: `cells` by source and victim, `clean` by row."""

    threat: str
    steps: int
    cells: dict[str, dict[str, Figures]]
    clean: dict[str, Figures]
    ensembles: dict[str, list[str]] = Field(default_factory=dict)
    """What stands behind the sources that are no rows."""

    @property
    def victims(self) -> list[str]:
        return list(next(iter(self.cells.values())))


def load_transfer(reports: Path) -> TransferFile | None:
    """The transfer matrix of a profile; None where there is none."""
    path = reports / "study" / "transfer.json"
    return read(TransferFile, path) if path.exists() else None


def load_study(reports: Path) -> StudyFile | None:
    """The study of a profile; None where it is off, or was not run."""
    folder = reports / "study"
    if not (folder / "index.json").exists():
        return None
    index = read(Index, folder / "index.json")
    if not index.models:
        return None
    return read(StudyFile, folder / "study.json").model_copy(update={"files": index.files})
