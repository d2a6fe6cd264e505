"""Several training seeds of one profile: the worst of them, the mean, and how far apart they are.

A profile NAME trained with another seed N is called NAME_sN (`python -m pipeline profile NAME --seed N`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from casemate.reporting.leaderboard import Entry, Leaderboard

SEEDED = re.compile(r"(.+)_s(\d+)")


@dataclass(frozen=True)
class Spread:
    """One figure over seeds: fractions in [0, 1], and the smallest n behind them."""

    worst: float
    mean: float
    best: float
    n: int


@dataclass(frozen=True)
class Seeds:
    """A system trained with several seeds; None where a seed has no such figure."""

    system: str
    seeds: tuple[int, ...]
    statuses: tuple[str, ...]
    clean: Spread | None
    core: Spread | None
    every: Spread | None


def base_of(profile: str) -> str:
    """The profile's name without its seed."""
    found = SEEDED.fullmatch(profile)
    return found.group(1) if found else profile


def over_seeds(boards: Sequence[Leaderboard]) -> dict[str, tuple[Seeds, ...]]:
    """The first profile of each group of seeds -> the systems that at least two of them have, the best worst seed
    first. Where one seed of a system is not ranked its statuses say so; a figure that one seed lacks is not given."""
    first: dict[str, str] = {}
    groups: dict[str, dict[str, list[Entry]]] = {}
    for board in boards:
        leading = first.setdefault(base_of(board.profile), board.profile)
        for entry in board.entries:
            groups.setdefault(leading, {}).setdefault(entry.system, []).append(entry)
    found = {
        profile: sorted((_seeds(s, e) for s, e in systems.items() if len(e) > 1), key=_order)
        for profile, systems in groups.items()
    }
    return {profile: tuple(systems) for profile, systems in found.items() if systems}


def _seeds(system: str, entries: list[Entry]) -> Seeds:
    entries = sorted(entries, key=lambda e: (e.train_seed is None, e.train_seed))
    return Seeds(
        system, tuple(e.train_seed for e in entries if e.train_seed is not None), tuple(e.status for e in entries),
        _spread([(e.clean, e.clean_n) for e in entries]),
        _spread([(e.worst_core, e.worst_core_n) for e in entries]),
        _spread([(e.worst_all, e.worst_all_n) for e in entries]),
    )  # fmt: skip


def _spread(figures: list[tuple[float | None, int | None]]) -> Spread | None:
    values = [value for value, n in figures if value is not None and n is not None]
    if len(values) < len(figures):
        return None
    return Spread(min(values), sum(values) / len(values), max(values), min(n for _, n in figures if n is not None))


def _order(found: Seeds) -> tuple[float, float, str]:
    first, second = (1.0 if s is None else -s.worst for s in (found.every, found.core))
    return first, second, found.system
