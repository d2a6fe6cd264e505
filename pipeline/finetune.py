"""Stage finetune: fit the attacks that learn to one trained system, which stays frozen.

python -m pipeline.finetune --row at_pgd
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import STATE, device_of, recording, row_of, stage, write_json, write_text
from pipeline.train import TrainingSet, as_csv, task_of, training_data

if TYPE_CHECKING:
    from casemate.params import Generator, Params
    from casemate.training.loop import Trained


def run(params: Params, options: argparse.Namespace) -> None:
    row = row_of(params, options.row, params.evaluate.models, "evaluate.models")
    out = params.models_dir / "generators" / row
    generators = params.finetune.generators if row in params.victims else {}
    for stale in [p for p in out.glob("*") if p.name not in generators]:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    if generators:
        device = device_of(params)
        data = training_data(params, device)
        for name, generator in generators.items():
            fit(params, row, name, generator, data, device)
    write_json(out / "index.json", sorted(generators))


def fit(params: Params, row: str, name: str, generator: Generator, data: TrainingSet, device: str) -> None:
    """Fit one attack to the row's system and write its weights and curves."""
    from casemate.errors import UserError
    from casemate.registry import code_hash, location, resolve
    from casemate.system import TorchSystem
    from casemate.training.artifact import load_system, save_artifact
    from casemate.training.loop import train
    from casemate.versions import versions

    victim = load_system(params.models_dir / "trained" / row, device=device)
    if not isinstance(victim, TorchSystem):
        raise UserError(f"finetune: {row} offers no gradients to fit {name} with; take it out of finetune.generators")
    recipe = generator.recipe.scaled(params.budget)
    method = resolve("learned_attack", generator.method)(**generator.options)
    task = task_of(params, data, recipe, params.network, victim=victim.classifier, victim_system=victim)
    code = code_hash(location("learned_attack", generator.method)[0])
    card: dict[str, Any] = {
        "attack": {"method": generator.method, "options": asdict(method)}, 
        "victim": {"row": row, "hash": victim.hash()},
        "recipe": recipe.as_dict(), "seed": params.seed, "budget": params.budget,
        "input_shape": list(data.dataset.input_shape), "num_classes": len(data.dataset.classes),
        "threat": params.threat.model_dump(), "code": {"method": code},
    }  # fmt: skip
    out, rooms = params.models_dir / "generators" / row / name, versions()
    shared = {room: rooms[room] for room in ("data", "networks", "training")}
    card |= {"data": data.facts(), "rooms": shared, "train_size": params.train_size, "validation": params.validation}
    if fitted(out, card):
        print(f"{name}: fitted to {row} already, with these settings")
        return
    with recording(params, "finetune", f"{row}-{name}") as recorder:
        recorder.params({"victim": row, "attack": name, "recipe": recipe.as_dict()})

        def save(done: Trained) -> None:
            write_text(out / "curves.csv", as_csv(done.curves))
            save_artifact(out, done.modules, {**card, "metrics": done.curves[-1]})  # last: it says "fitted already"

        train(
            method, task, data.train, None, recipe, seed=params.seed, device=device,
            checkpoints=STATE / "checkpoints", identity=card, recorder=recorder, progress=True,
            save=save,
        )  # fmt: skip
        recorder.output(out / "weights.safetensors")


def fitted(out: Path, card: dict[str, Any]) -> bool:
    """Whether `out` holds whole weights that were fitted with exactly these settings to exactly this victim."""
    from casemate.errors import UserError
    from casemate.training.artifact import load_artifact

    try:
        found = load_artifact(out)[1]
    except UserError:
        return False
    return all(found.get(key) == value for key, value in json.loads(json.dumps(card)).items())


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row of `evaluate.models` in params.yaml"})
