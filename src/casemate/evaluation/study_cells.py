"""From the ledger to the study: every cell of a row as `Attacked`, with images, targets and an oracle's word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from casemate.attacks.aimed import Aimed, targets_of
from casemate.evaluation.attacked import Attacked
from casemate.evaluation.ledger import full_precision
from casemate.evaluation.plan import Bind, Planned, Runner, plan_suites
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.stored import Images, OnDemand, Take
from casemate.system import System


@dataclass(frozen=True)
class Studied:
    """One cell: `case`, the index of each of its images in the test split, and what was run."""

    case: Attacked
    indices: np.ndarray
    planned: Planned

    def about(self) -> dict[str, Any]:
        """The conditions of its figures."""
        return {
            "model": self.case.model, "attack": self.case.attack, "suite": self.planned.suite,
            "method": self.planned.method, "budget": str(self.planned.budget), "images": len(self.indices),
            "parameters": self.planned.attack.parameters(),
        }  # fmt: skip


def studied(
    row: str, system: System, runner: Runner, params: EvaluateParams, suites: Sequence[str], *, budget: float,
    bind: Bind, oracle: System | None = None,
) -> Iterator[Studied]:  # fmt: skip
    """Every cell of the suites (all of them, if none is named) on the system's adaptive view.

    A cell is read from the ledger; what it lacks, images included, is computed as the evaluate stage would. Images
    that were not kept are left out.
    """
    total = len(runner.data)
    plan = plan_suites(system, params, runner.threat, total=total, most=total, budget=budget, bind=bind)
    for planned in plan.suites:
        if planned.view != "adaptive" or (suites and planned.suite not in suites):
            continue
        cell = runner.finish(system, planned, row=row, keep=True)
        draw = planned.attack.draw if isinstance(planned.attack, Aimed) else None
        targets = None if draw is None else targets_of(cell.rows["label"], system.num_classes, draw)
        within = planned.threat if planned.attack.minimum_norm else None
        case = Attacked.of_cell(row, planned.name, cell, taken(runner), targets, within)
        assert isinstance(case.x_adv, OnDemand)
        indices = case.x_adv.indices
        if oracle is not None:
            case = replace(case, oracle=decided(oracle, case.x_adv, runner))
        yield Studied(case, indices, planned)


def taken(runner: Runner) -> Take:
    """The runner's clean images."""
    return lambda indices: runner.data.take(indices)[0].cpu().numpy()


def decided(system: System, images: Images, runner: Runner) -> np.ndarray:
    """(N,) the decisions of a system on images N x C x H x W, a chunk of the ledger at a time."""
    found = []
    with system.frozen(), full_precision(), torch.no_grad():
        for start in range(0, len(images), runner.ledger.chunk):
            part = torch.from_numpy(images[start : start + runner.ledger.chunk]).to(runner.data.device)
            found.append(system.decide(part).cpu().numpy())
    return np.concatenate(found) if found else np.empty(0, np.int64)


def oracle_clean(system: System, cases: Sequence[Studied], runner: Runner) -> dict[str, Any]:
    """{"n", "accuracy"} of the oracle on the clean images that any of the cases holds: what it could agree with at
    most, more or less."""
    indices = sorted({int(index) for found in cases for index in found.indices})
    clean = OnDemand(np.asarray(indices), taken(runner))
    right = decided(system, clean, runner) == runner.data.images.labels[np.asarray(indices)]
    return {"n": len(indices), "accuracy": float(right.mean()) if len(indices) else None}
