"""Stage release: attack every exported file of a row as it is served, and give each its card.

python -m pipeline.release --row at_pgd

A file whose robust accuracy falls more than `release.margin` under the evaluation's worst case, or whose parity
fails, keeps its card, which says so, and is never the champion.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import STATE, device_of, md5, needed, read_json, recording, row_of, stage, write_json

if TYPE_CHECKING:
    from casemate.deploy.card import Card
    from casemate.deploy.served import Search
    from casemate.evaluation.images import EvaluationSet
    from casemate.params import Params
    from casemate.tracking import MlflowRecorder

RAW = Path("data/raw")


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate.data import load_dataset
    from casemate.deploy.served import Search
    from casemate.evaluation.images import EvaluationSet

    row = row_of(params, options.row, params.export.models, "export.models")
    exported = exported_files(params, row)
    for name in ("ledger.parquet", "adversarial.npz"):
        needed(params.models_dir / "evaluated" / row / name, "evaluate", row)
    data = EvaluationSet(load_dataset(params.dataset, RAW).test, device_of(params))
    out = params.models_dir / "released" / row
    making = out.with_name(f".{row}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    search = Search(params.release.queries, params.release.steps, params.seed)
    with recording(params, "release", row) as recorder:
        files = {}
        for path in exported:
            card, left = release(params, row, path, data, search, making / path.stem)
            files[path.stem] = entry(card, left)
            record(params, recorder, path, card, (making / path.stem / "MODEL_CARD.md").read_text())
        shutil.rmtree(out, ignore_errors=True)
        making.rename(out)
        write_json(params.reports_dir / "release" / f"{row}.json", {
            "schema": 1, "row": row, "margin": params.release.margin, "queries": search.queries,
            "steps": search.steps, "seed": search.seed, "files": files,
        })  # fmt: skip


def exported_files(params: Params, row: str) -> list[Path]:
    """The files of an exported row, of which there is always one: a row that has none fails the export. Raises
    UserError, before anything that was released is replaced."""
    from casemate.errors import UserError

    folder = params.models_dir / "exported" / row
    files = sorted(folder.glob("*.onnx"))
    if not files:
        raise UserError(
            f"{folder} holds no .onnx file; run the export stage first: python -m pipeline.export --row {row}"
        )
    return files


def release(
    params: Params, row: str, path: Path, data: EvaluationSet, search: Search, out: Path
) -> tuple[Card, dict[str, float]]:
    """Judge one file, and put it with its cards into the folder `out`. Returns the card, and what attacks left."""
    from casemate.deploy import card as cards
    from casemate.deploy.onnx_system import OnnxSystem
    from casemate.deploy.release import judge, make_card, read_table, system_of
    from casemate.deploy.served import attack_file
    from casemate.threat import ThreatModel
    from casemate.training.artifact import load_artifact, load_system

    mode, _, variant = path.stem.partition(".")
    evaluated, trained = params.models_dir / "evaluated" / row, params.models_dir / "trained" / row
    evaluation = read_json(params.reports_dir / "evaluate" / f"{row}.json")
    threat = ThreatModel(evaluation["threat"]["norm"], evaluation["threat"]["radius"])
    system = system_of(evaluation, mode)
    table = None
    if system is not None:
        table = read_table(evaluated / "ledger.parquet", system["name"], threat, data.dimensions)
    indices = chosen(data, table, params.release.images)
    x, y = data.take(indices)
    file, source = OnnxSystem(path), load_system(trained, mode, data.device)
    found = attack_file(
        file, x, y, threat, search, source=source, stored=stored(evaluated / "adversarial.npz", indices, x),
        progress=lambda line: print(f"{row} {path.stem}: {line}"),
    )  # fmt: skip
    checks = [] if variant else parity(source, path, data, indices, evaluated / "adversarial.npz")
    gate = judge(found, table, indices, params.release.margin, checks)
    card = make_card(file, load_artifact(trained)[1], evaluation, mode, gate)
    out.mkdir(parents=True)
    shutil.copyfile(path, out / card.file)
    cards.write(card, out)
    print(f"{row} {path.stem}: the gate is {'passed' if gate.passed else 'NOT passed'}, {gate.checks[-1].detail}")
    return card, found.report()["left"]


def chosen(data: EvaluationSet, table: Any, count: int) -> Any:
    """The first `count` images of the evaluation's order, of those that every attack of the table has finished."""
    import numpy as np

    from casemate.evaluation.images import evaluation_order

    order = np.asarray(evaluation_order(len(data)))
    return order[:count] if table is None else order[np.isin(order, table.index)][:count]


def stored(path: Path, indices: Any, x: Any) -> Any:
    """The adversarial images that the evaluation kept of these; the clean image where it kept none."""
    import numpy as np
    import torch

    made = x.clone()
    with np.load(path) as kept:
        known = {int(index): place for place, index in enumerate(kept["indices"])} if "indices" in kept else {}
        pairs = [(at, known[int(index)]) for at, index in enumerate(indices) if int(index) in known]
        if pairs:
            here, there = (list(side) for side in zip(*pairs, strict=True))
            made[here] = torch.from_numpy(kept["x_adv"][there]).to(x)
    return made


def parity(source: Any, path: Path, data: EvaluationSet, indices: Any, kept: Path) -> list[dict[str, Any]]:
    """The checks of a parity report on these images, and on the stored adversarial ones."""
    import numpy as np

    from casemate.deploy.parity import Labelled, parity_report

    with np.load(kept) as found:
        adversarial = Labelled(found["x_adv"], found["labels"]) if "labels" in found else None
    test = Labelled(data.images.images[indices], data.images.labels[indices])
    checks: list[dict[str, Any]] = parity_report(source, path, test, adversarial=adversarial)["checks"]
    return checks


def entry(card: Card, left: dict[str, float]) -> dict[str, Any]:
    """What the report of the stage says of a file."""
    gate = card.gate
    assert gate is not None
    return {
        "sha256": card.sha256, "form": card.form, "variant": card.variant, "passed": gate.passed,
        "served": gate.served.model_dump(mode="json"),
        "table": None if gate.table is None else gate.table.model_dump(mode="json"), "left": left,
        "failed": [check.name for check in gate.checks if not check.passed],
    }  # fmt: skip


def record(params: Params, recorder: MlflowRecorder, path: Path, card: Card, text: str) -> None:
    """The figures as metrics, and the gate's word and the card on the registered version of this very file."""
    from casemate import model_registry

    gate = card.gate
    assert gate is not None
    figures = {"served": gate.served.accuracy, "passed": float(gate.passed)}
    recorder.metrics({f"gate/{path.stem}/{name}": value for name, value in figures.items()})
    tags = {
        "casemate.gate": "passed" if gate.passed else "failed", "casemate.sha256": card.sha256,
        model_registry.CARD: card.text(),
    }  # fmt: skip
    model_registry.describe(
        STATE / "mlflow", params.tracking.experiment, f"casemate-{params.profile}", md5(path), tags, text
    )


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row of `export.models` in params.yaml"})
