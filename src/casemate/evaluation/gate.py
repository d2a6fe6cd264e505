"""The masking gate: signs that a system's gradients mislead the attacks, so that its accuracy is not robustness.

Three verdicts: a cell is an "upper bound" when another attack of its suite beats it; a system is "unreliable" when a
check fails; else "ok". Comparisons are paired (exact McNemar, p < .01). The checks are those of Athalye et al. (2018,
section 3.1) and Carlini et al. (2019); the numbers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from casemate.attacks.apgd import APGD
from casemate.attacks.base import Attack
from casemate.attacks.gradient import FGSM, PGD
from casemate.evaluation import masking
from casemate.evaluation.ledger import Cell
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import Planned, Runner
from casemate.evaluation.probes import RandomCorners
from casemate.evaluation.schema import GateParams
from casemate.system import System
from casemate.threat import ThreatModel

UNBOUNDED = 0.5
LOSSES: tuple[Literal["ce", "margin", "dlr"], ...] = ("ce", "margin", "dlr")


def not_run() -> dict[str, Any]:
    """The gate's entry for a system it was not run on."""
    return {"verdict": "not run", "static": "not run", "checks": []}


def gate_cells(
    params: GateParams, threat: ThreatModel, total: int, classes: int, *, swept: bool
) -> list[Planned]:  # fmt: skip
    """The attacks that the gate needs beside the suites, on the adaptive view of a system of so many classes."""
    pgd = PGD(steps=params.steps)
    attacks: dict[str, tuple[Attack, ThreatModel]] = {
        "fgsm": (FGSM(), threat),
        "fewer": (PGD(steps=params.fewer_steps), threat),
        "pgd": (pgd, threat),
        "unbounded": (
            PGD(steps=params.unbounded_steps, restarts=params.unbounded_restarts), ThreatModel("linf", UNBOUNDED),
        ),
    }  # fmt: skip
    if params.restarts > 1:
        attacks["restarts"] = (PGD(steps=params.fewer_steps, restarts=params.restarts), threat)
    if params.losses:
        asked = LOSSES if classes > 2 else LOSSES[:2]  # DLR is not defined for two classes
        attacks |= {f"loss_{name}": (APGD(steps=params.steps, objective=name), threat) for name in asked}
    if params.corners:
        attacks["corners"] = (RandomCorners(tries=params.corners), threat)
    if not swept:
        attacks["half"] = (pgd, ThreatModel(threat.norm, threat.radius / 2))
    return [
        Planned(name, "gate", type(attack).__name__, attack, where, "adaptive", min(params.images, total))
        for name, (attack, where) in attacks.items()
    ]


def run_gate(
    system: System, runner: Runner, params: GateParams, suites: Sequence[Finished],
    sweep: Sequence[tuple[float, Cell]],
) -> dict[str, Any]:  # fmt: skip
    """Every check on one system: {"verdict", "static", "checks"}.

    `sweep` holds (radius, cell) pairs of rising radius. Attacks needed beyond it and `suites` run through the ledger.
    A static evaluation far above the adaptive one is an illusion of that protocol: it discredits the static figures
    ("static") and not the system, whose ranked figure is the adaptive one; nor do single attacks that restarts or
    another loss beat, which the worst case covers.
    """
    swept = len(sweep) > 1
    planned = gate_cells(params, runner.threat, len(runner.data), system.num_classes, swept=swept)
    probes = {cell.name: runner.finish(system, cell) for cell in planned}
    series = sweep if swept else [(runner.threat.radius / 2, probes["half"]), (runner.threat.radius, probes["pgd"])]
    checks = [
        masking.single_step(probes["fgsm"], probes["pgd"]),
        masking.more_steps(probes["fewer"], probes["pgd"], params),
        masking.more_radius(series),
        masking.unbounded(probes["unbounded"]),
        masking.zero_gradients(system, runner, planned[0].images),
        *masking.static_above_adaptive(system, suites),
        *masking.above_clean(suites),
        *masking.black_above_white_box(suites, runner.threat),
    ]
    if params.restarts > 1:
        checks.append(masking.more_restarts(probes["fewer"], probes["restarts"], params))
    if params.losses:
        by_loss: dict[str, Cell] = {name: probes[f"loss_{name}"] for name in LOSSES if f"loss_{name}" in probes}
        checks.append(masking.loss_choice(by_loss))
    if params.corners:
        # one start each: many random starts are a random search themselves
        white = [probes["pgd"], probes["fewer"], probes["fgsm"], *(f.cell for f in suites if f.white_box)]
        checks.append(masking.random_search(probes["corners"], white, runner.threat))
    return entry([check.as_dict() for check in checks], system.changes_inference)


def entry(checks: Sequence[dict[str, Any]], changes_inference: bool) -> dict[str, Any]:
    """What a row reports of these checks: {"verdict", "static", "checks"}."""
    failed = {check["concerns"] for check in checks if not check["passed"]}
    return {
        "verdict": "unreliable" if "system" in failed else "ok",
        "static": ("unreliable" if "static" in failed else "ok") if changes_inference else "not run",
        "checks": list(checks),
    }


def verdicts(cells: Sequence[Finished]) -> list[str]:
    """For each cell: "upper bound" if another under the same budget, of whatever suite, beats it, or if its attack is
    one that was cut short, else "ok"."""
    said = []
    for mine in cells:
        rivals = [c for c in cells if c is not mine and c.planned.budget == mine.planned.budget]
        weak = mine.planned.attack.upper_bound or any(masking.outdoes(rival.cell, mine.cell)[0] for rival in rivals)
        said.append("upper bound" if weak else "ok")
    return said
