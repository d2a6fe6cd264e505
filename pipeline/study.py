"""Stage study: what attacks did beyond the leaderboard, out of the ledger: tables, distances, ablations, pictures;
and what examples that are crafted on one model do to another.

python -m pipeline.study

Off, and no more than an index file, unless `study` in params.yaml names models, or sources of a transfer matrix.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import STATE, attack_bar, device_of, recording, stage, write_json
from pipeline.evaluate import RAW, binder, candidates

if TYPE_CHECKING:
    from casemate.evaluation.plan import Runner
    from casemate.evaluation.study_cells import Studied
    from casemate.params import Params


def run(params: Params, options: argparse.Namespace) -> None:
    out = params.reports_dir / "study"
    staging = out.with_name(".study.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if params.study.models or params.study.transfer.sources:
        with recording(params, "study") as recorder:
            if params.study.models:
                write(params, staging)
            if params.study.transfer.sources:
                write_json(staging / "transfer.json", transfer(params))
            for path in sorted(staging.glob("*.json")):
                recorder.artifact(path)
    files = sorted(path.name for path in staging.iterdir())
    write_json(staging / "index.json", {"schema": 1, "models": params.study.models, "files": files})
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)


def write(params: Params, out: Path) -> None:
    """The study's JSON and pictures."""
    from casemate.evaluation.study import remembered, study, with_iwd
    from casemate.reporting.study import pictures
    from casemate.reporting.study_pictures import sheets, strips

    wanted = params.study
    found, about = collect(params)
    distances = remembered(with_iwd(wanted.protocol))
    tables = ablations(params, found, distances)
    main = [f.case for f in found if f.case.model in wanted.models and shown(params, f.planned.suite)]
    made = study(main, distances, images=wanted.images, ablations=tables, about=about)
    made.save(out / "study.json")
    pictures(out / "study.json", out)
    pairs = [(f.case, f.indices) for f in found if f.case.model in wanted.models]
    strips(pairs, wanted.strips, out)
    in_table = [(f.case, f.indices) for f in found if f.case in main]
    sheets(in_table, wanted.pictures, out)


def shown(params: Params, suite: str) -> bool:
    return not params.study.suites or suite in params.study.suites


def collect(params: Params) -> tuple[list[Studied], dict[str, Any]]:
    """Every cell that the study needs, and its conditions."""
    from casemate.evaluation.study_cells import oracle_clean, studied
    from casemate.training.artifact import load_system

    wanted, device, trained = params.study, device_of(params), params.models_dir / "trained"
    source = load_system(trained / params.evaluate.source, device=device) if params.evaluate.source else None
    oracle = load_system(trained / wanted.oracle, device=device) if wanted.oracle else None
    rows = list(dict.fromkeys([*wanted.models, *(r for a in wanted.ablations.values() for r in a.rows.values())]))
    found: list[Studied] = []
    with attack_bar() as progress:
        runner = runner_of(params, device, progress)
        for row in rows:
            system = candidates(params, row, device)[0].system
            found += studied(
                row, system, runner, params.evaluate, needed(params), budget=params.budget,
                bind=binder(params, row, source), oracle=oracle,
            )  # fmt: skip
    about: dict[str, Any] = {
        "profile": params.profile, "dataset": params.dataset, "budget": params.budget, "seed": params.seed,
        "threat": str(runner.threat), "protocol": wanted.protocol, "distances_of": wanted.images,
        "cells": [f.about() for f in found],
    }  # fmt: skip
    if oracle is not None:
        about["oracle"] = {"row": wanted.oracle, **oracle_clean(oracle, found, runner)}
    return found, about


def runner_of(params: Params, device: str, progress: Any) -> Runner:
    """What reads the ledger, and fills what it lacks, on the images that every evaluation attacks."""
    from casemate.data import load_dataset
    from casemate.evaluation.images import EvaluationSet
    from casemate.evaluation.ledger import Ledger
    from casemate.evaluation.plan import Runner
    from casemate.threat import ThreatModel

    data = EvaluationSet(load_dataset(params.dataset, RAW).test, device)
    threat = ThreatModel(params.threat.norm, params.threat.radius)
    ledger = Ledger(STATE / "ledger", params.evaluate.chunk)
    return Runner(ledger, data, threat, params.seed, params.evaluate.subset, progress)


def transfer(params: Params) -> dict[str, Any]:
    """The transfer matrix, and its conditions."""
    from casemate.attacks.transfer import Transfer
    from casemate.ensemble import Ensemble
    from casemate.evaluation.matrix import transfer_matrix

    wanted, device = params.study.transfer, device_of(params)
    victims = wanted.victims or params.evaluate.models
    systems = {row: candidates(params, row, device)[0].system for row in dict.fromkeys([*wanted.sources, *victims])}
    sources = {row: systems[row] for row in wanted.sources}
    sources |= {name: Ensemble({row: systems[row] for row in rows}) for name, rows in wanted.ensembles.items()}
    with attack_bar() as progress:
        runner = runner_of(params, device, progress)
        found = transfer_matrix(
            sources, {row: systems[row] for row in victims}, runner,
            Transfer(steps=wanted.steps, relative_step=wanted.relative_step),
            images=min(wanted.images, len(runner.data)),
        )  # fmt: skip
    print(found)
    return {
        "schema": 1, **found.as_dict(), "steps": wanted.steps, "relative_step": wanted.relative_step,
        "seed": params.seed, "budget": params.budget, "ensembles": wanted.ensembles,
    }  # fmt: skip


def needed(params: Params) -> list[str]:
    """The suites that anything of the study is in; none stands for all of them."""
    if not params.study.suites:
        return []
    cells = {cell for ablation in params.study.ablations.values() for cell in ablation.cells.values()}
    cells |= set(params.study.strips)
    return [s for s, content in params.evaluate.suites.items() if shown(params, s) or cells & content.attacks.keys()]


def ablations(params: Params, found: list[Studied], distances: Any) -> list[dict[str, Any]]:
    from casemate.evaluation.study import ablation

    tables = []
    for name, wanted in params.study.ablations.items():
        by_cell = {
            value: [f.case for f in found if f.case.attack == cell and f.case.model in params.study.models]
            for value, cell in wanted.cells.items()
        }
        by_row = {
            value: [f.case for f in found if f.case.model == row and shown(params, f.planned.suite)]
            for value, row in wanted.rows.items()
        }
        # the same attack under several values has several cell names: the option's table calls them one
        tables.append(ablation(name, by_cell or by_row, distances, params.study.images, merge=bool(by_cell)))
    return tables


if __name__ == "__main__":
    stage(run, doc=__doc__)
