"""One row evaluated: every suite on every inference mode, the worst cases, the sweep, the gate, the gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from casemate.attacks.learned import FittedAttack
from casemate.evaluation import curvature, gate, masking, robustness
from casemate.evaluation.band import band_entry
from casemate.evaluation.gallery import gallery
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Cell, Ledger, Shard, select, write_selection
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import (
    Bind,
    Cost,
    Plan,
    Planned,
    Progress,
    Runner,
    bind_source,
    blind,
    estimate,
    not_evaluated,
    plan_suites,
    plan_sweep,
)
from casemate.evaluation.schema import EvaluateParams, Sweep
from casemate.evaluation.selection import HeldOut
from casemate.evaluation.worst import covering, worst_cases
from casemate.system import System
from casemate.threat import ThreatModel


@dataclass(frozen=True)
class Candidate:
    """A system to evaluate: a row in one inference mode."""

    system: System
    mode: str = "plain"
    primary: bool = True

    def name(self, row: str) -> str:
        return row if self.primary else f"{row}+{self.mode}"


@dataclass(frozen=True)
class About:
    """What the report says of a row besides figures. `card` is the training card."""

    profile: str
    row: str
    method: str
    dataset: str
    network: str
    classes: Sequence[str]
    card: Mapping[str, Any]
    budget: float = 1.0
    undefended: bool = False
    """The row is a standard classifier: attacks that learn must bring it down, or they are not fitted."""

    @property
    def untrained(self) -> bool:
        """Trained for less than one effective epoch."""
        return float(self.card.get("effective_epochs", 1.0)) < 1.0


@dataclass(frozen=True)
class RowEvaluation:
    """`report` is reports/P/evaluate/ROW.json, `rows` its selection of the ledger, `adversarial` the kept images."""

    report: dict[str, Any]
    rows: pa.Table
    adversarial: dict[str, np.ndarray]

    def save(self, folder: Path) -> None:
        """Write ledger.parquet and adversarial.npz to `folder`, each to a temporary name and renamed."""
        write_selection(self.rows, folder / "ledger.parquet")
        temporary = folder / ".adversarial.npz.tmp"
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.adversarial)
        temporary.replace(folder / "adversarial.npz")


def evaluate_row(
    about: About,
    candidates: Sequence[Candidate],
    data: EvaluationSet,
    threat: ThreatModel,
    params: EvaluateParams,
    ledger: Ledger,
    *,
    seed: int = 0,
    source: System | None = None,
    bind: Bind | None = None,
    held_out: EvaluationSet | None = None,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> RowEvaluation:
    """Run what the ledger does not hold yet, and report.

    Args:
        candidates: the row's systems; the primary one runs every suite in full, the sweep and the gate, the others
            every suite on at most `params.secondary_images` images.
        data: the test images.
        source: the system that transfer attacks are crafted on.
        bind: what binds attacks that need more than a source; by default only a source can be bound.
        held_out: images of the validation split, by which a champion is chosen (`params.selection`).
        say: is told the cost before anything runs, and each cell's figure as it is done.
        progress: called as chunks are done.

    A killed run goes on where it was: the ledger holds every finished chunk.
    """
    runner = Runner(ledger, data, threat, seed, params.subset, progress)
    held = HeldOut.of(held_out, runner, params)
    jobs = [_Job(c, runner, params, about, bind or bind_source(source), say, held) for c in candidates]
    say(f"{about.row}: {sum((job.cost() for job in jobs), Cost())}")
    results = [job.run() for job in jobs]
    _compare_with_classifier(jobs, results, threat)
    primary = next((i for i, candidate in enumerate(candidates) if candidate.primary), 0)
    floors = [floor.model_dump(exclude={"rows"}) for floor in params.floors if about.row in floor.rows]
    return RowEvaluation(
        report={
            "schema": 1, "profile": about.profile, "row": about.row, "method": about.method,
            "dataset": about.dataset, "network": about.network, "classes": list(about.classes),
            "budget": about.budget, "seed": seed, "threat": _threat(threat), "card": dict(about.card),
            "untrained": about.untrained, "systems": [result.entry for result in results],
            **({"floors": floors} if floors else {}),
        },
        rows=select([item for result in results for item in result.rows]),
        adversarial=gallery(candidates[primary].system, results[primary].suites, runner),
    )  # fmt: skip


def fill_ledger(
    about: About,
    candidates: Sequence[Candidate],
    data: EvaluationSet,
    threat: ThreatModel,
    params: EvaluateParams,
    ledger: Ledger,
    shard: Shard,
    *,
    seed: int = 0,
    source: System | None = None,
    bind: Bind | None = None,
    held_out: EvaluationSet | None = None,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> None:
    """Compute one shard of what `evaluate_row` needs, and report nothing: several processes, or machines that share
    or merge the ledger's folder, fill it together; `evaluate_row` then finds everything there."""
    runner = Runner(ledger, data, threat, seed, params.subset, progress, shard)
    held = HeldOut.of(held_out, runner, params)
    for candidate in candidates:
        job = _Job(candidate, runner, params, about, bind or bind_source(source), say, held)
        for cell in job.plan.cells:
            runner.finish(candidate.system, cell, row=job.name, keep=candidate.primary and cell in job.plan.suites)
        if held is not None:
            held.finish(candidate.system, job.selection, job.name)
    say(f"{about.row}: shard {shard.number} of {shard.of} is in the ledger")


@dataclass(frozen=True)
class _Result:
    entry: dict[str, Any]
    suites: list[Finished]
    rows: list[tuple[dict[str, str], Cell]]
    """Every cell the entry was computed from, with its labels."""


def _compare_with_classifier(jobs: Sequence[_Job], results: Sequence[_Result], threat: ThreatModel) -> None:
    """Where the gate was run on a system that changes inference and its classifier alone was evaluated, too, the
    comparison of the two joins the gate's checks."""
    bare = next((result for job, result in zip(jobs, results, strict=True) if not job.system.changes_inference), None)
    for job, result in zip(jobs, results, strict=True):
        if bare is None or not job.plan.gate or not job.system.changes_inference:
            continue
        whole, alone = (covering(which.suites, threat) for which in (result, bare))
        found = masking.above_own_classifier(whole, alone, threat)
        checks = [*result.entry["gate"]["checks"], *(check.as_dict() for check in found)]
        result.entry["gate"] = gate.entry(checks, job.system.changes_inference)


class _Job:
    """The evaluation of one system."""

    def __init__(
        self, candidate: Candidate, runner: Runner, params: EvaluateParams, about: About, bind: Bind,
        say: Callable[[str], None], held: HeldOut | None = None,
    ) -> None:  # fmt: skip
        self.candidate, self.system, self.runner, self.params, self.say = (
            candidate, candidate.system, runner, params, say,
        )  # fmt: skip
        self.undefended = about.undefended
        self.name = candidate.name(about.row)
        self.not_evaluated = not_evaluated(self.system)
        total = len(runner.data)
        asked = max(total if s.images == "all" else min(s.images, total) for s in params.suites.values())
        self.images = asked if candidate.primary else min(params.secondary_images, asked)
        self.plan = Plan() if self.not_evaluated else self._plan(about.budget, bind)
        self.held = None if self.not_evaluated else held
        self.selection = [] if self.held is None else self.held.cells(self.plan.suites)

    def _plan(self, budget: float, bind: Bind) -> Plan:
        total, threat, params = len(self.runner.data), self.runner.threat, self.params
        plan = plan_suites(
            self.system, params, threat, total=total, most=self.images, budget=budget, bind=bind
        )  # fmt: skip
        if not self.candidate.primary or "gradient" not in self.system.offers or blind(self.system):
            return plan  # there is no face on which plain ascent would meet the whole system
        if params.sweep is not None:
            plan.sweep = plan_sweep(params.sweep, threat, total=total, budget=budget, bind=bind)
        if params.gate is not None:
            plan.gate = gate.gate_cells(
                params.gate, threat, total, self.system.num_classes, swept=len(plan.sweep) > 1
            )
        return plan

    def cost(self) -> Cost:
        tested = estimate(self.system, self.plan.cells, self.runner)
        return tested if self.held is None else tested + estimate(self.system, self.selection, self.held.runner)

    def run(self) -> _Result:
        for left_out, why in self.plan.skipped.items():
            self.say(f"{self.name}: {left_out} is left out: it {why}")
        clean = self.runner.ledger.clean(self.system, self.runner.data, self.runner.order(self.images))
        suites = [Finished(cell, self._finish(cell)) for cell in self.plan.suites]
        sweep = self._sweep()
        entry = {
            "name": self.name, "mode": self.candidate.mode, "primary": self.candidate.primary,
            "hash": self.system.hash(), "changes_inference": self.system.changes_inference,
            "clean": robustness.clean_rate(clean),
            "cells": cell_entries(suites, self.params.fit_limit, self.undefended),
            "worst": worst_cases(self.system, suites, self.runner.threat),
            "sweep": _sweep_entry(self.params.sweep, sweep), "gate": gate.not_run(),
        }  # fmt: skip
        if (band := band_entry(self.system, self.runner, self.images)) is not None:
            entry["band"] = band
        if self.held is not None:
            entry["selection"] = self.held.entry(self.system, self.selection, self.name)
        if self.not_evaluated:
            entry["not_evaluated"] = self.not_evaluated
            self.say(f"{self.name}: {self.not_evaluated}")
        if self.plan.gate and self.params.gate is not None:
            entry["gate"] = gate.run_gate(self.system, self.runner, self.params.gate, suites, sweep)
            if self.params.gate.curvature:
                entry["curvature"] = curvature.figures(self.system, self.runner, self.params.gate.curvature)
        return _Result(entry, suites, self._rows(clean, suites, sweep))

    def _finish(self, cell: Planned) -> Cell:
        found = self.runner.finish(self.system, cell, row=self.name, keep=self.candidate.primary)
        left = robustness.rate(found.rows["success"])["accuracy"]
        self.say(f"{self.name} {cell}: {100 * left:.2f} % left of {len(found):,}")
        return found

    def _sweep(self) -> list[tuple[float, Cell]]:
        """(radius, cell) pairs; radius 0 is the clean images."""
        if self.params.sweep is None or not self.plan.sweep:
            return []
        cells = [
            (cell.threat.radius, self.runner.finish(self.system, cell, row=self.name)) for cell in self.plan.sweep
        ]
        if 0 not in self.params.sweep.radii:
            return cells
        order = self.runner.order(self.plan.sweep[0].images)
        return [(0.0, self.runner.ledger.clean(self.system, self.runner.data, order)), *cells]

    def _rows(
        self, clean: Cell, suites: Sequence[Finished], sweep: Sequence[tuple[float, Cell]]
    ) -> list[tuple[dict[str, str], Cell]]:
        plain = {"system": self.name, "suite": "", "attack": "clean", "view": "", "threat": ""}
        rows = [(plain, clean)]
        for f in suites:
            p = f.planned
            labels = {"suite": p.suite, "attack": p.name, "view": p.view, "threat": str(p.budget)}
            rows.append(({**plain, **labels}, f.cell))
        for radius, cell in sweep:
            threat = ThreatModel(self.runner.threat.norm, radius)
            labels = {"suite": "sweep", "attack": "sweep", "view": "adaptive", "threat": str(threat)}
            rows.append(({**plain, **labels}, cell))
        return rows


def cell_entries(
    finished: Sequence[Finished], fit_limit: float = 0.05, undefended: bool = False
) -> list[dict[str, Any]]:
    """The figures of each cell, with the verdict among the cells of its budget, and of an attack that learns whether
    its fit passed the check that an undefended model makes (None where this is no such model)."""
    return [
        {
            "attack": f.planned.name, "method": f.planned.method, "spec": f.planned.attack.parameters(),
            "view": f.planned.view, "suite": f.planned.suite, "threat": _threat(f.planned.budget),
            "protocol": "published" if f.planned.published else "adaptive",
            **robustness.figures(f.cell), "verdict": verdict, **_fit(f, fit_limit, undefended),
            **({"remarks": list(f.cell.remarks)} if f.cell.remarks else {}),
        }
        for f, verdict in zip(finished, gate.verdicts(finished), strict=True)
    ]  # fmt: skip


def _fit(finished: Finished, limit: float, undefended: bool) -> dict[str, Any]:
    """{"fit": {"limit", "passed"}} of an attack that learns (ATTACKS 8.4)."""
    if not isinstance(finished.planned.attack, FittedAttack):
        return {}
    left = robustness.rate(finished.cell.rows["success"])["accuracy"]
    return {"fit": {"limit": limit, "passed": left < limit if undefended else None}}


def _threat(budget: Any) -> dict[str, Any]:
    """Of a threat model, or of what an attack has in its place; the radius is None where nothing is limited."""
    return {"norm": budget.norm, "radius": budget.radius, "text": str(budget)}


def _sweep_entry(sweep: Sweep | None, cells: Sequence[tuple[float, Cell]]) -> dict[str, Any] | None:
    if sweep is None or not cells:
        return None
    rates = [robustness.rate(cell.rows["success"]) for _, cell in cells]
    return {
        "attack": sweep.attack, "options": dict(sweep.options), "radii": [radius for radius, _ in cells],
        **{key: [r[key] for r in rates] for key in ("accuracy", "low", "high")},
        "n": rates[0]["n"], "view": "adaptive",
    }  # fmt: skip
