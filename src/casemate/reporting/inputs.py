"""What the report reads: the JSON, CSV and NPZ files that the stages before it wrote, as checked values.

Accuracies are fractions in [0, 1], intervals are 95 % Wilson intervals, passes are means per image. Unknown keys
are ignored, so an older report reads a newer file of the same schema.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from casemate.errors import UserError
from casemate.reporting.detection import Detection, load_detections
from casemate.reporting.records import Number, Record, read
from casemate.reporting.study_file import StudyFile, TransferFile, load_study, load_transfer

View = Literal["adaptive", "static"]
Verdict = Literal["ok", "unreliable", "not run"]


class Rate(Record):
    """A share of `n` images with its 95 % interval, all in [0, 1]."""

    accuracy: float
    low: float
    high: float
    n: int


class Threat(Record):
    """A threat model as the evaluation names it; `radius` in pixel units."""

    norm: str
    radius: float
    text: str


class Budget(Record):
    """What the successes of a cell are successes under: a threat model, or what the attack has in its place, its
    radius in units of its own and None where nothing is limited."""

    norm: str
    radius: float | None
    text: str


class Worst(Rate):
    """Accuracy over the union of several attacks; `incomplete` names those that have not finished."""

    attacks: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()


class Selection(Worst):
    """The adaptive worst case of one suite on images of the validation split: what chooses the champion."""

    suite: str


class Suite(Record):
    """The worst case of one suite. An adaptive attacker has the static attacks too, so `adaptive` is over both;
    `static` is over static ones alone, `published` over these and the attacks of the defense's own paper; both are
    None where the system has only one face."""

    adaptive: Worst | None = None
    static: Worst | None = None
    published: Worst | None = None


class Fit(Record):
    """Of an attack that learns: whether it left less than `limit` of an undefended model; None on any other model."""

    limit: float
    passed: bool | None = None


class Cell(Rate):
    """One attack on one view of one system; passes are means per image, distances are in pixel units."""

    attack: str
    method: str
    view: View
    suite: str
    protocol: Literal["adaptive", "published"] = "adaptive"
    """Published: how papers evaluate such a system, with static attacks and with those of the defense's own paper."""
    threat: Budget | None = None
    """Where it is another than the row's: another ball, or a budget outside balls such as `flow tau 0.05`."""
    asr: Number = None
    forwards: Number = None
    backwards: Number = None
    queries: Number = None
    linf_max: Number = None
    l2_mean: Number = None
    verdict: str = "ok"
    fit: Fit | None = None
    remarks: tuple[str, ...] = ()
    """What the attack warned of: signs that its figure misleads."""
    spec: dict[str, Any] = Field(default_factory=dict)


class Sweep(Record):
    """Robust accuracy against the radius (pixel units), on `n` images."""

    attack: str
    radii: tuple[float, ...]
    accuracy: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    n: int
    view: View = "adaptive"


class Check(Record):
    """One question of the masking gate; `p` is the p value where the answer is a test."""

    name: str
    passed: bool | None
    detail: str = ""
    p: Number = None
    concerns: Literal["system", "static", "attack"] = "system"
    """What a failure discredits: the system's figures, those of static attacks, or single attacks."""


class Gate(Record):
    """The masking gate's verdict on a system's evaluation; `static` is that on its static figures alone."""

    verdict: Verdict = "not run"
    static: Verdict = "not run"
    checks: tuple[Check, ...] = ()


class Band(Record):
    """Of a purification that treats inputs otherwise whose score lies strictly between `low` and `high`: how many of
    `n` clean images that are, and between which scores all of them lie."""

    low: float
    high: float
    inside: int
    n: int
    lowest: float
    highest: float


class Curvature(Record):
    """The dominant eigenvalue of the Hessian of the classifier's loss in the image (pixel units), over the `n` images
    looked at that are right."""

    median: float
    mean: float
    n: int


class Evaluated(Record):
    """One system: a row in one inference mode."""

    name: str
    mode: str
    primary: bool = True
    hash: str = ""
    changes_inference: bool = False
    clean: Rate | None = None
    cells: tuple[Cell, ...] = ()
    worst: dict[str, Suite] = Field(default_factory=dict)
    sweep: Sweep | None = None
    gate: Gate = Gate()
    band: Band | None = None
    curvature: Curvature | None = None
    selection: Selection | None = None

    def worst_case(self, suite: str, face: Literal["adaptive", "static", "published"]) -> Worst | None:
        """The worst case of `suite` ("core", "extended" or "all") as one face shows it, if it was evaluated."""
        worst: Worst | None = getattr(self.worst.get(suite, Suite()), face)
        return worst

    def label(self, cell: Cell) -> str:
        """The attack's name, told apart from its adaptive twin where the system has two faces."""
        return f"{cell.attack} (static)" if self.changes_inference and cell.view == "static" else cell.attack


class Floor(Record):
    """What the row must keep in the worst case of a suite."""

    suite: str
    accuracy: float


class Evaluation(Record):
    """`evaluate/ROW.json`."""

    schema_: int
    profile: str
    row: str
    method: str
    dataset: str
    network: str
    classes: tuple[str | int, ...] = ()
    budget: float = 1.0
    seed: int = 0
    threat: Threat
    card: dict[str, Any] = Field(default_factory=dict)
    untrained: bool = False
    floors: tuple[Floor, ...] = ()
    systems: tuple[Evaluated, ...]

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=lambda name: name.rstrip("_"))


class ParityNumber(Record):
    """One figure of a parity report and the bound it must keep."""

    name: str
    value: float | str | None
    bound: float | str | None = None
    passed: bool


class ParityFile(Record):
    """The parity of one exported file with PyTorch."""

    file: str
    form: str = ""
    passed: bool
    numbers: tuple[ParityNumber, ...] = ()


class Parity(Record):
    """`export/ROW.json`."""

    row: str = ""
    files: tuple[ParityFile, ...] = ()


class Released(Record):
    """What the release gate found on one exported file: `served` is left of it attacked as it is served, `table` what
    the evaluation leaves of the same images, `left` the share that still stands after each attack in turn."""

    passed: bool
    variant: str = "float32"
    served: Rate
    table: Rate | None = None
    left: dict[str, float] = Field(default_factory=dict)
    failed: tuple[str, ...] = ()


class Releases(Record):
    """`release/ROW.json`: the files by inference mode, a changed precision after a dot."""

    margin: float
    queries: int
    files: dict[str, Released] = Field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Everything known about one row of the profile; only the evaluation must exist."""

    evaluation: Evaluation
    train: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    """Column -> one value per epoch; None where the file leaves a value out."""
    parity: Parity | None = None
    releases: Releases | None = None
    gallery: Path | None = None
    """`adversarial.npz`, or None."""

    @property
    def name(self) -> str:
        return self.evaluation.row


@dataclass(frozen=True)
class ReportInputs:
    """All rows of one profile."""

    profile: str
    rows: tuple[Row, ...]
    detections: tuple[Detection, ...] = ()
    """Of the rows that have detectors."""
    study: StudyFile | None = None
    transfer: TransferFile | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """Words on a row."""

    @classmethod
    def load(
        cls, profile: str, reports: Path, models: Path, rows: Sequence[str] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> ReportInputs:  # fmt: skip
        """Read `reports` (reports/P) and `models` (models/P). `rows` names the rows to show, in that order; without
        it, every row evaluated there, sorted. Raises UserError for a file that is missing or not as expected."""
        if rows is None:
            rows = sorted(p.stem for p in (reports / "evaluate").glob("*.json"))
        if not rows:
            raise UserError(f"{reports / 'evaluate'} holds no evaluation: run the evaluate stage first")
        return cls(
            profile,
            tuple(_row(reports, models, name) for name in rows),
            load_detections(reports),
            load_study(reports),
            load_transfer(reports),
            dict(notes or {}),
        )

    @property
    def failed_fits(self) -> dict[str, tuple[str, Cell]]:
        """Attacks that learn and left too much of an undefended system: name -> (that system, its cell). What they
        leave of any other says nothing."""
        found: dict[str, tuple[str, Cell]] = {}
        for system in (s for row in self.rows for s in row.evaluation.systems):
            for cell in system.cells:
                if cell.fit is not None and cell.fit.passed is False:
                    found.setdefault(cell.attack, (system.name, cell))
        return found


def _row(reports: Path, models: Path, name: str) -> Row:
    evaluation = read(Evaluation, reports / "evaluate" / f"{name}.json")
    if evaluation.schema_ != 1:
        raise UserError(f"evaluate/{name}.json has schema {evaluation.schema_}, not 1: run the evaluate stage again")
    train, export, release = (reports / stage / f"{name}.json" for stage in ("train", "export", "release"))
    curves, gallery = reports / "curves" / f"{name}.csv", models / "evaluated" / name / "adversarial.npz"
    return Row(
        evaluation,
        train=read(_Metrics, train).model_dump() if train.exists() else {},
        curves=read_curves(curves) if curves.exists() else {},
        parity=read(Parity, export) if export.exists() else None,
        releases=read(Releases, release) if release.exists() else None,
        gallery=gallery if gallery.exists() else None,
    )


class _Metrics(BaseModel):
    model_config = ConfigDict(extra="allow")


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """Columns of a curves file by name. Raises UserError for a value that is not a number."""
    columns: dict[str, list[float | None]] = {}
    with path.open(newline="") as lines:
        for number, line in enumerate(csv.DictReader(lines), start=2):
            for key, value in line.items():
                columns.setdefault(key, []).append(_number(value, f"{path}, line {number}, {key}"))
    return columns


def _number(text: str | None, where: str) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise UserError(f"{where}: {text!r} is not a number; train that row again") from None
    return value if math.isfinite(value) else None
