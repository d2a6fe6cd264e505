"""Transfer matrices: the accuracy of every victim on examples crafted on every source, as a query of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from casemate.attacks.base import Attack
from casemate.attacks.transfer import SourcedTransfer, Transfer
from casemate.evaluation.plan import Runner
from casemate.evaluation.robustness import clean_rate, fallen, rate
from casemate.system import System
from casemate.threat import ThreatModel

Figures = Mapping[str, Any]
"""{"accuracy", "low", "high", "n"}: a fraction, its 95 % interval (Wilson), and the number of images."""


@dataclass(frozen=True)
class TransferMatrix:
    """`cells[source][victim]` and `clean[name]` (of sources too) hold `Figures`. Where a victim is its own source the
    cell is a white box; all others are black boxes."""

    attack: str
    threat: ThreatModel
    cells: Mapping[str, Mapping[str, Figures]]
    clean: Mapping[str, Figures]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        cells = {source: {v: dict(f) for v, f in row.items()} for source, row in self.cells.items()}
        clean = {name: dict(figures) for name, figures in self.clean.items()}
        return {"attack": self.attack, "threat": str(self.threat), "cells": cells, "clean": clean}

    def __str__(self) -> str:
        """Sources down, victims across, in percent with the interval; n above the table."""
        victims = list(next(iter(self.cells.values())))
        n = max(figures["n"] for row in self.cells.values() for figures in row.values())
        rows = [["crafted on", *victims], ["(clean)", *(_text(self.clean[v]) for v in victims)]]
        rows += [[source, *(_text(row[v]) for v in victims)] for source, row in self.cells.items()]
        wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.attack}, {self.threat}, {n:,} images, accuracy in %", *lines])


def transfer_matrix(
    sources: Mapping[str, System],
    victims: Mapping[str, System],
    runner: Runner,
    attack: Attack | None = None,
    *,
    images: int | None = None,
) -> TransferMatrix:
    """Accuracy of each of `victims` on examples crafted on each of `sources`, all by name.

    Args:
        runner: whose ledger, evaluation set, threat model and seed are used. Cells that the ledger holds are not
            computed again; each source crafts its examples once, however many victims look at them.
        attack: one that takes a source, by default `Transfer()`: PGD-20 with steps of a quarter of the radius.
        images: the first so many of the evaluation order; all without a number.

    Raises UserError if the attack takes no source, or a source offers no gradient.
    """
    attack = attack or Transfer()
    order, cells = runner.order(images), {}
    for source_name, source in sources.items():
        bound = attack.with_source(source)
        if isinstance(bound, SourcedTransfer):
            bound = bound.remembering()
        row = {}
        for name, victim in victims.items():
            cell = runner.ledger.run(victim, runner.data, bound, runner.threat, "adaptive", order, runner.seed)
            row[name] = rate(fallen(cell, runner.threat))
        cells[source_name] = row
    clean = {
        name: clean_rate(runner.ledger.clean(system, runner.data, order))
        for name, system in {**sources, **victims}.items()
    }
    return TransferMatrix(type(attack).__name__.lower(), runner.threat, cells, clean)


def _text(figures: Figures) -> str:
    low, high, accuracy = (100 * figures[name] for name in ("low", "high", "accuracy"))
    return f"{accuracy:.2f} ({low:.1f}-{high:.1f})"
