"""Stage evaluate: attack a trained system with every suite, judge the result, keep the selection of the ledger.

python -m pipeline.evaluate --row at_pgd

Several processes can share the work: each fills the ledger with one shard (--shard 1/2, --shard 2/2); the stage run
without --shard afterwards finds everything there, and reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import STATE, attack_bar, device_of, read_json, recording, row_of, stage, write_json

if TYPE_CHECKING:
    from casemate.attacks.base import Attack
    from casemate.data import Loaded
    from casemate.evaluation.images import EvaluationSet
    from casemate.params import Params
    from casemate.system import System

RAW = Path("data/raw")


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate.data import load_dataset
    from casemate.evaluation.images import EvaluationSet
    from casemate.evaluation.ledger import Ledger, Shard
    from casemate.evaluation.suite import evaluate_row, fill_ledger
    from casemate.threat import ThreatModel
    from casemate.tracking import evaluation_metrics
    from casemate.training.artifact import load_system

    row = row_of(params, options.row, params.evaluate.models, "evaluate.models")
    device = device_of(params)
    trained, out = params.models_dir / "trained", params.models_dir / "evaluated" / row
    loaded = load_dataset(params.dataset, RAW)
    data = EvaluationSet(loaded.test, device)
    source = load_system(trained / params.evaluate.source, device=device) if params.evaluate.source else None
    card = read_json(trained / row / "card.json")
    what = (
        about(params, row, card), candidates(params, row, device), data,
        ThreatModel(params.threat.norm, params.threat.radius), params.evaluate,
        Ledger(STATE / "ledger", params.evaluate.chunk),
    )  # fmt: skip
    bind, held_out = binder(params, row, source), validation_images(params, loaded, device)
    if options.shard:
        shard = Shard.parse(options.shard)
        with attack_bar() as progress:
            fill_ledger(
                *what, shard, seed=params.seed, source=source, bind=bind, held_out=held_out, progress=progress
            )
        return
    with recording(params, "evaluate", row) as recorder, attack_bar() as progress:
        done = evaluate_row(*what, seed=params.seed, source=source, bind=bind, held_out=held_out, progress=progress)
        out.mkdir(parents=True, exist_ok=True)
        done.save(out)
        write_json(params.reports_dir / "evaluate" / f"{row}.json", done.report)
        recorder.params({"row": row, "method": card["defense"]["method"], "network": card["network"]["name"]})
        recorder.metrics(evaluation_metrics(done.report))
        recorder.output(out / "ledger.parquet")


def validation_images(params: Params, loaded: Loaded, device: str) -> EvaluationSet | None:
    """The validation split of the training images, by which the champion is chosen; None without one."""
    from casemate.data.splits import split_train, take
    from casemate.evaluation.images import EvaluationSet

    if not params.validation or params.evaluate.selection is None:
        return None
    split = split_train(loaded.train.labels, params.validation, params.seed, params.train_size)
    return EvaluationSet(take(loaded.train, split.validation), device)


def about(params: Params, row: str, card: dict[str, Any]) -> Any:
    from casemate.evaluation.suite import About

    return About(
        params.profile, row, card["defense"]["method"], params.dataset, card["network"]["name"],
        card["classes"], card, params.budget, undefended=row in params.pretrain,
    )  # fmt: skip


def candidates(params: Params, row: str, device: str) -> list[Any]:
    """The row in every inference mode of its defense, the primary one first."""
    from casemate.evaluation.suite import Candidate
    from casemate.registry import resolve
    from casemate.training.artifact import load_system

    modes = resolve("defense", params.rows[row].method).inference_modes
    folder = params.models_dir / "trained" / row
    return [Candidate(load_system(folder, mode, device), mode, mode == modes[0]) for mode in modes]


def binder(params: Params, row: str, source: System | None) -> Any:
    """Binds transfer attacks to the source, and attacks that learn to the weights fitted to this row, if any are."""
    from casemate.errors import UserError, near
    from casemate.registry import resolve
    from casemate.training.artifact import load_artifact

    generators, is_victim = params.finetune.generators, row in params.victims

    def bind(name: str, attack: Attack) -> Attack | None:
        if attack.binds is None:
            return attack
        if attack.binds == "source":
            if source is None:
                raise UserError(f"attack {name!r} needs evaluate.source in params.yaml")
            return attack.with_source(source)
        if not is_victim:
            return None
        wanted = getattr(attack, "generator", None) or name
        if wanted not in generators:
            raise UserError(
                f"attack {name!r} is fitted by the finetune stage: give it the name of one of "
                f"finetune.generators, or name one in its option 'generator'{near(wanted, generators)}"
            )
        weights, card = load_artifact(params.models_dir / "generators" / row / wanted)
        fitted = resolve("learned_attack", card["attack"]["method"])(**card["attack"]["options"])
        flat = {f"{module}.{key}": value for module, tensors in weights.items() for key, value in tensors.items()}
        return attack.with_weights(
            fitted, flat, input_shape=tuple(card["input_shape"]), num_classes=card["num_classes"]
        )

    return bind


if __name__ == "__main__":
    stage(
        run,
        doc=__doc__,
        arguments={"row": "a row of `evaluate.models` in params.yaml"},
        optional={"shard": "NUMBER/OF: fill the ledger with one part of the work, and report nothing"},
    )
