"""Stage train: train one defense.

python -m pipeline.train --row at_pgd
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import STATE, device_of, recording, row_of, stage, write_json, write_text

if TYPE_CHECKING:
    from casemate.params import Method, Network, Params
    from casemate.trainable import Task
    from casemate.training.loop import Trained
    from casemate.training.recipe import Recipe

RAW = Path("data/raw")


def run(params: Params, options: argparse.Namespace) -> None:
    train_row(params, row_of(params, options.row, list(params.defenses), "defenses"), "train")


def train_row(params: Params, row: str, stage_name: str, start: str | None = None) -> None:
    """Train a row, from the weights of another where `start` names one; write its artifact, metrics and curves."""
    from casemate.registry import resolve
    from casemate.training.artifact import make_card, save_artifact, with_classifier
    from casemate.training.loop import train

    device, method = device_of(params), params.rows[row]
    data = training_data(params, device)
    recipe = method.recipe.scaled(params.budget)
    network = method.network or params.network
    task = task_of(params, data, recipe, network)
    begun: dict[str, Any] = {}
    if start is not None:
        task, begun = with_classifier(task, params.models_dir / "trained" / start)
    out, reports = params.models_dir / "trained" / row, params.reports_dir
    with recording(params, stage_name, row) as recorder:
        recorder.params({"row": row, "method": method.method, "options": method.options, "recipe": recipe.as_dict()})

        def save(done: Trained) -> None:
            card = make_card(
                **data.facts(), network=network.name, network_options=network.options,
                normalise=data.statistics(network), defense=method.method, defense_options=method.options,
                recipe=recipe, threat=task.threat, seed=params.seed, budget=params.budget, trained=done,
            )  # fmt: skip
            save_artifact(out, done.modules, {**card, **begun})
            last = {k: v for k, v in done.curves[-1].items() if k not in ("epoch", "lr")}
            ran = {"epochs": done.epochs, "chosen_epoch": done.chosen_epoch}
            write_json(reports / "train" / f"{row}.json", {"row": row, "budget": params.budget, **ran, **last})
            write_text(reports / "curves" / f"{row}.csv", as_csv(done.curves))
            recorder.output(out / "weights.safetensors")
            recorder.artifact(out / "card.json")

        train(
            resolve("defense", method.method)(**method.options), task, data.train, data.validation, recipe,
            seed=params.seed, device=device, checkpoints=STATE / "checkpoints",
            identity={**identity(params, data, method), **begun}, recorder=recorder, progress=True,
            pad=data.dataset.pad, flip=data.dataset.flip, save=save,
        )  # fmt: skip


def identity(params: Params, data: TrainingSet, method: Method) -> dict[str, Any]:
    """What decides the result besides what the loop knows itself: a checkpoint of anything else is not resumed."""
    from casemate.registry import code_hash, location
    from casemate.versions import versions

    rooms = versions()
    return {
        "data": data.facts(), "train_size": params.train_size, "validation": params.validation,
        "network": (method.network or params.network).model_dump(),
        "code": code_hash(location("defense", method.method)[0]),
        "rooms": {room: rooms[room] for room in ("data", "networks", "training")},
    }  # fmt: skip


class TrainingSet:
    """The splits of the profile's data set, resident on the device."""

    def __init__(self, params: Params, device: str) -> None:
        from casemate.data import load_dataset
        from casemate.data.device import DeviceData
        from casemate.data.splits import split_train, take

        loaded = load_dataset(params.dataset, RAW)
        self.name = params.dataset
        self.dataset = loaded.dataset
        split = split_train(loaded.train.labels, params.validation, params.seed, params.train_size)
        self.train = DeviceData(take(loaded.train, split.train), device)
        self.validation = DeviceData(take(loaded.train, split.validation), device)

    def facts(self) -> dict[str, Any]:
        """What a card says of the data."""
        manifest = (RAW / self.name / "manifest.json").read_bytes()
        return {
            "dataset": self.name, "data_checksum": hashlib.sha256(manifest).hexdigest(),
            "classes": list(self.dataset.classes), "input_shape": self.dataset.input_shape,
        }  # fmt: skip

    def statistics(self, network: Network) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation for the network's first layer, if it asks for one."""
        return (self.dataset.mean, self.dataset.std) if network.normalise else None


def training_data(params: Params, device: str) -> TrainingSet:
    return TrainingSet(params, device)


def task_of(params: Params, data: TrainingSet, recipe: Recipe, network: Network, **victim: Any) -> Task:
    """What a method is given to build itself."""
    from casemate.networks.base import Normalise, build_network
    from casemate.threat import ThreatModel
    from casemate.trainable import Task

    dataset, statistics = data.dataset, data.statistics(network)

    def fresh() -> Any:
        return build_network(
            network.name, input_shape=dataset.input_shape, num_classes=len(dataset.classes),
            normalise=Normalise(*statistics) if statistics else None, **network.options,
        )  # fmt: skip

    threat = ThreatModel(params.threat.norm, params.threat.radius)
    return Task(dataset.input_shape, len(dataset.classes), threat, fresh, recipe.player, **victim)


def as_csv(curves: list[dict[str, float]]) -> str:
    """One line per epoch; a column for everything that was ever logged."""
    columns = list(dict.fromkeys(key for line in curves for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" for k, v in line.items()} for line in curves)
    return text.getvalue()


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row under `defenses` in params.yaml"})
