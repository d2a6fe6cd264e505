"""The attack x defense table: one line per attack, one column per system and face, robust accuracy in each cell."""

from __future__ import annotations

from dataclasses import dataclass

from casemate.reporting.inputs import Cell, Evaluated, Rate, ReportInputs
from casemate.reporting.leaderboard import Entry


@dataclass(frozen=True)
class Group:
    """A system's columns: `faces` is ("adaptive", "static"), or ("",) where the two are one."""

    system: str
    faces: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """An attack, or the worst case over all of them, and one cell per column. `threat` is named where it is another
    than the row's. A worst case is adaptive: there is none of the static face."""

    attack: str
    suite: str
    threat: str | None
    cells: tuple[Rate | None, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different n of its cells, ascending."""
        return tuple(sorted({cell.n for cell in self.cells if cell is not None}))


@dataclass(frozen=True)
class HeatMap:
    """Columns in groups, lines from the core suite to the worst case."""

    groups: tuple[Group, ...]
    lines: tuple[Line, ...]


def heat_map(inputs: ReportInputs, order: tuple[Entry, ...]) -> HeatMap:
    """The cells of every system in the order of the leaderboard, the unevaluated left out."""
    by_name = {s.name: s for row in inputs.rows for s in row.evaluation.systems}
    systems = [by_name[e.system] for e in order if by_name[e.system].cells]
    groups = tuple(Group(s.name, _faces(s)) for s in systems)
    found = {(s.name, *key): cell for s in systems for key, cell in _cells(s).items()}
    columns = [(s, face) for s, group in zip(systems, groups, strict=True) for face in group.faces]
    usual = inputs.rows[0].evaluation.threat.text
    lines = [
        Line(attack, suite, threat if threat != usual else None,
             tuple(found.get((s.name, suite, attack, face)) for s, face in columns))
        for (suite, attack), threat in _attacks(systems, usual).items()
    ]  # fmt: skip
    worst = tuple(None if face == "static" else s.worst_case("all", "adaptive") for s, face in columns)
    return HeatMap(groups, (*lines, Line("worst case", "all", None, worst)))


def _attacks(systems: list[Evaluated], usual: str) -> dict[tuple[str, str], str]:
    """(suite, attack) -> threat model, suite by suite in the order in which the evaluations name them."""
    cells = [cell for system in systems for cell in system.cells]
    suites = list(dict.fromkeys(cell.suite for cell in cells))
    cells.sort(key=lambda cell: suites.index(cell.suite))
    return {(cell.suite, cell.attack): cell.threat.text if cell.threat else usual for cell in cells}


def _faces(system: Evaluated) -> tuple[str, ...]:
    return ("adaptive", "static") if system.changes_inference else ("",)


def _cells(system: Evaluated) -> dict[tuple[str, str, str], Cell]:
    """(suite, attack, face) -> cell."""
    return {(c.suite, c.attack, c.view if system.changes_inference else ""): c for c in system.cells}
