"""The leaderboard: one row per system, ranked by what is left of it under the worst of every adaptive attack."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from casemate.errors import UserError
from casemate.reporting.inputs import Cell, Evaluated, Evaluation, Rate, ReportInputs, Row, Verdict

Status = Literal["ranked", "untrained", "not evaluated", "failed", "incomplete", "unreliable"]
STATUSES: tuple[Status, ...] = get_args(Status)
Release = Literal["passed", "failed", "not run"]
"""The release gate on the system's exported file; not run where it is not exported."""
FIGURES = ("clean", "worst_core", "worst_all", "published")


@dataclass(frozen=True)
class Entry:
    """One system. Accuracies, intervals and the gap are fractions; None where nothing was measured.

    `worst_core` and `worst_all` are adaptive worst cases. `published` is what `published_attack` alone leaves, the
    strongest of those that papers would evaluate the system with (`protocol`), and `gap` how far that lies above
    `worst_all`. `strongest_attack` leaves the lowest accuracy under the row's threat model. `attacks` make up
    `worst_all`; `forwards` and `backwards` are the passes that they spend on one image, all together. `served` is
    left of the exported file attacked as it is served. `reason` says of a failed one what it had to keep. `least` is
    the adaptive worst case of the one suite that leaves fewest: fewer attacks than `worst_all`, but on more images.
    `selection` is the adaptive worst case of a suite on validation images. Figures of different n are of different
    images, and so is a gap between two of them.
    """

    rank: int | None
    system: str
    row: str
    mode: str
    method: str
    dataset: str
    network: str
    status: Status
    champion: bool
    verdict: Verdict
    clean: float | None
    clean_low: float | None
    clean_high: float | None
    clean_n: int | None
    worst_core: float | None
    worst_core_low: float | None
    worst_core_high: float | None
    worst_core_n: int | None
    worst_all: float | None
    worst_all_low: float | None
    worst_all_high: float | None
    worst_all_n: int | None
    published: float | None
    published_low: float | None
    published_high: float | None
    published_n: int | None
    published_attack: str | None
    static_verdict: Verdict
    gap: float | None
    strongest_attack: str | None
    attacks: int
    epochs: float | None
    effective_epochs: float | None
    train_seed: int | None
    attack_seed: int
    budget: float
    forwards: float | None
    backwards: float | None
    threat: str
    radius: float
    release: Release = "not run"
    served: float | None = None
    reason: str | None = None
    least: float | None = None
    least_low: float | None = None
    least_high: float | None = None
    least_n: int | None = None
    least_suite: str | None = None
    selection: float | None = None
    selection_low: float | None = None
    selection_high: float | None = None
    selection_n: int | None = None


@dataclass(frozen=True)
class Leaderboard:
    """The entries of one profile, ranked ones first."""

    profile: str
    entries: tuple[Entry, ...]

    @property
    def ranked(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.rank is not None)

    @property
    def unranked(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.rank is None)

    def json(self) -> str:
        """`leaderboard.json`: the champion's name, the main figures by system (an object of numbers, which is what
        `dvc metrics` shows and compares), and the entries in full."""
        best = champion(self)
        figures = {e.system: {key: getattr(e, key) for key in FIGURES} for e in self.entries}
        rows = [dataclasses.asdict(e) for e in self.entries]
        found = {"schema": 1, "profile": self.profile, "champion": best.system if best else None}
        found |= {"figures": figures, "rows": rows}
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"

    def csv(self) -> str:
        """`leaderboard.csv`: the same entries and keys; an empty field where JSON has null."""
        lines = io.StringIO()
        keys = [f.name for f in dataclasses.fields(Entry)]
        writer = csv.DictWriter(lines, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(e) for e in self.entries)
        return lines.getvalue()

    @classmethod
    def read(cls, path: Path) -> Leaderboard:
        """A `leaderboard.json`. Raises UserError for a file that is not there, or is not one."""
        try:
            found: Mapping[str, Any] = json.loads(path.read_text())
            return cls(found["profile"], tuple(Entry(**row) for row in found["rows"]))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist yet; 'dvc repro' makes it") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a leaderboard of this version: run the report stage again") from None


def build(inputs: ReportInputs) -> Leaderboard:
    """Rank the systems of every row. Raises UserError if rows were attacked under different threat models or on
    different datasets: their figures cannot share a ranking."""
    conditions = {(e.dataset, e.threat.text): e.row for e in (row.evaluation for row in inputs.rows)}
    if len(conditions) > 1:
        listed = "; ".join(f"{row}: {dataset}, {threat}" for (dataset, threat), row in conditions.items())
        raise UserError(f"profile {inputs.profile!r}: one leaderboard, one dataset and threat model, not {listed}")
    entries = [_entry(row, system) for row in inputs.rows for system in row.evaluation.systems]
    ranked = sorted((e for e in entries if e.status == "ranked"), key=_order)
    placed = [dataclasses.replace(e, rank=i) for i, e in enumerate(ranked, start=1)]
    rest = sorted((e for e in entries if e.status != "ranked"), key=lambda e: (STATUSES.index(e.status), _order(e)))
    board = Leaderboard(inputs.profile, (*placed, *rest))
    best = champion(board)
    return Leaderboard(inputs.profile, tuple(dataclasses.replace(e, champion=e is best) for e in board.entries))


def champion(leaderboard: Leaderboard) -> Entry | None:
    """Of the eligible systems the one that keeps most on validation images; of equals one that can be served, then
    the first in the ranking. The ranking alone decides where one was not judged on those images (`chosen_apart`)."""
    found = eligible(leaderboard)
    if chosen_apart(leaderboard):
        return max(found, key=lambda e: (e.selection or 0.0, e.release == "passed", -(e.rank or 0)))
    return next(iter(found), None)


def eligible(leaderboard: Leaderboard) -> list[Entry]:
    """Ranked systems whose evaluation the masking gate found sound, and whose exported file, if there is one, passed
    the release gate."""
    return [e for e in leaderboard.ranked if e.verdict == "ok" and e.release != "failed"]


def chosen_apart(leaderboard: Leaderboard) -> bool:
    """Whether the champion is chosen by other images than its figures are of."""
    found = eligible(leaderboard)
    return bool(found) and all(e.selection is not None for e in found)


def _order(entry: Entry) -> tuple[float, float, float, str]:
    scores = (entry.worst_all, entry.worst_core, entry.clean)
    first, second, third = (1.0 if s is None else -s for s in scores)
    return first, second, third, entry.system


def status(evaluation: Evaluation, system: Evaluated) -> Status:
    """Why a system is not ranked, the gravest reason first; "ranked" if none applies."""
    if evaluation.untrained:
        return "untrained"
    worst = [system.worst_case(suite, "adaptive") for suite in ("all", "core")]
    if system.clean is None or worst[0] is None:
        return "not evaluated"
    if below_floor(evaluation, system) is not None:
        return "failed"
    if any(w is not None and w.incomplete for w in worst):
        return "incomplete"
    return "unreliable" if system.gate.verdict == "unreliable" else "ranked"


def below_floor(evaluation: Evaluation, system: Evaluated) -> str | None:
    """Which floor a system is under, in words; None if it keeps them all. What is left of an unfinished or doubtful
    evaluation is at most its figure, so that is no excuse."""
    for floor in evaluation.floors:
        left = system.worst_case(floor.suite, "adaptive")
        if left is not None and left.accuracy < floor.accuracy:
            return (
                f"keeps {100 * left.accuracy:.1f} % of {left.n:,} images under the suite {floor.suite}, "
                f"and its floor is {100 * floor.accuracy:g} %"
            )
    return None


def strongest(evaluation: Evaluation, system: Evaluated) -> Cell | None:
    """The attack that leaves the lowest accuracy under the row's own threat model; the larger n, then the name,
    settles a tie."""
    return _lowest(evaluation, system.cells)


def protocol(evaluation: Evaluation, system: Evaluated) -> Cell | None:
    """The attack that leaves the lowest accuracy of a system that changes its inference, among those that a paper
    would report: the static ones, and those of the defense's own paper. One attack: no paper reports a union."""
    if not system.changes_inference:
        return None
    return _lowest(evaluation, (c for c in system.cells if c.view == "static" or c.protocol == "published"))


def least(evaluation: Evaluation, system: Evaluated) -> str | None:
    """The suite, of those within the row's own threat model, whose adaptive worst case leaves fewest."""
    own = {
        suite: worst
        for suite in system.worst
        if suite != "all" and (worst := system.worst_case(suite, "adaptive")) is not None
        and all(_within(evaluation, c) for c in system.cells if c.suite == suite)
    }  # fmt: skip
    return min(own, key=lambda suite: (own[suite].accuracy, -own[suite].n, suite), default=None)


def _within(evaluation: Evaluation, cell: Cell) -> bool:
    return cell.threat is None or cell.threat.text == evaluation.threat.text


def _lowest(evaluation: Evaluation, cells: Iterable[Cell]) -> Cell | None:
    same = (c for c in cells if c.n and _within(evaluation, c))
    return min(same, key=lambda c: (c.accuracy, -c.n, c.attack), default=None)


def _entry(row: Row, system: Evaluated) -> Entry:
    evaluation = row.evaluation
    everything, theirs = system.worst_case("all", "adaptive"), protocol(evaluation, system)
    hardest, suite = strongest(evaluation, system), least(evaluation, system)
    gap = None if everything is None or theirs is None else _round(theirs.accuracy - everything.accuracy)
    card, file = evaluation.card, None if row.releases is None else row.releases.files.get(system.mode)
    return Entry(
        rank=None, system=system.name, row=evaluation.row, mode=system.mode, method=evaluation.method,
        dataset=evaluation.dataset, network=evaluation.network, status=status(evaluation, system), champion=False,
        verdict=system.gate.verdict,
        **_rate("clean", system.clean), **_rate("worst_core", system.worst_case("core", "adaptive")),
        **_rate("worst_all", everything), **_rate("published", theirs),
        published_attack=system.label(theirs) if theirs else None, static_verdict=system.gate.static, gap=gap,
        strongest_attack=system.label(hardest) if hardest else None,
        attacks=len(everything.attacks) if everything else 0,
        epochs=card.get("epochs", card.get("recipe", {}).get("epochs")),
        effective_epochs=card.get("effective_epochs"), train_seed=card.get("seed"),
        attack_seed=evaluation.seed, budget=evaluation.budget,
        forwards=_total(c.forwards for c in system.cells), backwards=_total(c.backwards for c in system.cells),
        threat=evaluation.threat.text, radius=evaluation.threat.radius,
        release="not run" if file is None else "passed" if file.passed else "failed",
        served=None if file is None else _round(file.served.accuracy), reason=below_floor(evaluation, system),
        **_rate("selection", system.selection),
        least_suite=suite, **_rate("least", system.worst_case(suite, "adaptive") if suite else None),
    )  # fmt: skip


def _rate(name: str, rate: Rate | None) -> dict[str, Any]:
    if rate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_n": None}
    values = {name: rate.accuracy, f"{name}_low": rate.low, f"{name}_high": rate.high}
    return {**{key: _round(value) for key, value in values.items()}, f"{name}_n": rate.n}


def _total(passes: Iterable[float | None]) -> float | None:
    known = [p for p in passes if p is not None]
    return _round(sum(known)) if known else None


def _round(value: float) -> float:
    """Six digits: finer than one image in 10,000, and the same text in JSON and CSV."""
    return round(value, 6) + 0.0
