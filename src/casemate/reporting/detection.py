"""What the report reads and shows of detectors: `detect/ROW.json`, and its rows grouped for a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from casemate.errors import UserError
from casemate.reporting.records import Number, Record, read


class Attacked(Record):
    """An attack on the classifier alone: accuracy before and after, on `n` images."""

    attack: str
    threat: str
    n: int
    clean: float
    accuracy: float
    l2_mean: float


class Judged(Record):
    """A detector fitted to one attack and tested on one, at one threshold. Shares are of the images of set II; `_sd`
    is the deviation over splits, where there are several."""

    detector: str
    fitted_on: str
    tested_on: str
    familiar: bool
    threshold: Literal["half", "validation"]
    own: bool
    scope: Literal["all", "successes"]
    acc_adv: float
    acc_adv_sd: Number = None
    acc_nadv: float
    acc_nadv_sd: Number = None
    acc_cla: Number
    acc_cla_sd: Number = None
    acc_com: float
    acc_com_sd: Number = None
    system_natural: float
    system_natural_sd: Number = None
    noisy_false_alarms: float
    noisy_false_alarms_sd: Number = None
    auroc: float
    auroc_sd: Number = None
    tpr_at_5_fpr: float
    tpr_at_5_fpr_sd: Number = None
    n_adversarial: int
    n_natural: int


class Adaptive(Record):
    """What is left of classifier and detector under an attack that knows both, on `n` images: of the images that are
    accepted and right before it, a share `natural`, those that are rejected or right after it, `accuracy`."""

    detector: str
    fitted_on: str
    threat: str
    n: int
    natural: Number = None
    accuracy: float
    rejected: Number = None


class Stored(Record):
    """The detectors that are kept, fitted to one attack on `natural` validation images."""

    fitted_on: str
    natural: int
    detectors: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """One fit of one detector: its tests, that on the attack it was fitted to first, and the joint attack."""

    detector: str
    fitted_on: str
    tests: tuple[Judged, ...]
    adaptive: tuple[Adaptive, ...]


class Detection(Record):
    """`detect/ROW.json`: the detectors behind one row."""

    row: str
    method: str
    network: str
    budget: float
    detectors: dict[str, dict[str, Any]]
    set_1: int
    set_2: int
    splits: int
    attacks: tuple[Attacked, ...]
    rows: tuple[Judged, ...]
    adaptive: tuple[Adaptive, ...]
    stored: Stored

    @property
    def groups(self) -> list[Group]:
        """Every fit, at the detector's own threshold, over all attacked images."""
        shown = [row for row in self.rows if row.own and row.scope == "all"]
        fits = list(dict.fromkeys((row.detector, row.fitted_on) for row in shown))
        return [
            Group(
                *fit,
                tuple(sorted((r for r in shown if (r.detector, r.fitted_on) == fit), key=lambda r: not r.familiar)),
                tuple(a for a in self.adaptive if (a.detector, a.fitted_on) == fit),
            )
            for fit in fits
        ]

    def own_threshold(self, detector: str) -> str:
        """ "half" or "validation": the one that the detector uses."""
        return next(row.threshold for row in self.rows if row.own and row.detector == detector)

    @property
    def others(self) -> list[Judged]:
        """The rows that `groups` leaves out: the other threshold, and those over successful attacks only."""
        return [row for row in self.rows if not row.own or row.scope != "all"]


def load_detections(reports: Path) -> tuple[Detection, ...]:
    """The detectors of the rows that `detect/index.json` lists; none without it."""
    index = reports / "detect" / "index.json"
    if not index.exists():
        return ()
    try:
        rows = TypeAdapter(list[str]).validate_json(index.read_bytes())
    except ValueError:
        raise UserError(f"{index} is not a list of rows; run the stage that writes it again") from None
    return tuple(read(Detection, reports / "detect" / f"{row}.json") for row in rows)
