"""Stage export: a trained row as ONNX in every inference mode, each with a parity report; none is left that fails it.

python -m pipeline.export --row atld

Variants of other precision (`export.variants`) stand beside the files, each with a robust accuracy of its own.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import device_of, md5, needed, recording, row_of, stage, write_json

if TYPE_CHECKING:
    from casemate.data import Loaded
    from casemate.deploy.export import ExportOptions
    from casemate.deploy.parity import Labelled
    from casemate.params import Params
    from casemate.system import System

RAW = Path("data/raw")


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate import model_registry
    from casemate.data import load_dataset

    row = row_of(params, options.row, params.export.models, "export.models")
    device_of(params)  # sets the threads; files are made and compared on the CPU
    out, data = params.models_dir / "exported" / row, load_dataset(params.dataset, RAW)
    making = out.with_name(f".{row}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    with recording(params, "export", row) as recorder:
        report = export_modes(params, row, data, making)
        shutil.rmtree(out, ignore_errors=True)
        making.rename(out)
        write_json(params.reports_dir / "export" / f"{row}.json", report)
        for file in report["files"]:
            recorder.metrics({f"parity/{file['form']}/{n['name']}": n["value"] for n in file["numbers"]})
        images = data.test.images[:1]
        for path in sorted(out.glob("*.onnx")):
            model_registry.register(
                recorder,
                path,
                example=images.transpose(0, 3, 1, 2).astype("float32") / 255
                if params.export.layout == "float32-nchw" else images,
                registered=f"casemate-{params.profile}",
                tags={"casemate.row": row, "casemate.mode": path.stem, model_registry.MD5: md5(path)},
            )  # fmt: skip


def export_modes(params: Params, row: str, data: Loaded, out: Path) -> dict[str, Any]:
    """One file per inference mode, named after it, its parity report beside it; and the variants asked for. Modes and
    variants that cannot be had are named with the reason. Raises UserError if parity fails, or nothing can be had."""
    import numpy as np

    from casemate.deploy.export import form_of
    from casemate.deploy.metadata import about_card
    from casemate.deploy.parity import Labelled, export_with_parity
    from casemate.errors import UserError
    from casemate.registry import resolve
    from casemate.training.artifact import load_artifact, load_system

    images = needed(params.models_dir / "evaluated" / row / "adversarial.npz", "evaluate", row)
    trained = params.models_dir / "trained" / row
    about = about_card(load_artifact(trained)[1], row)
    with np.load(images) as kept:
        adversarial = Labelled(kept["x_adv"], kept["labels"]) if len(kept["labels"]) else None
    report: dict[str, Any] = {"row": row, "files": [], "variants": [], "refused": {}}
    for mode in resolve("defense", params.rows[row].method).inference_modes:
        system, path = load_system(trained, mode), out / f"{mode}.onnx"
        try:
            form_of(system)
        except UserError as error:
            report["refused"][mode] = str(error)
            print(f"{row} {mode} is left out: {error}")
            continue
        checked = export_with_parity(
            system, path, about, Labelled(data.test.images, data.test.labels), adversarial=adversarial,
            n=params.export.parity_images, options=options_of(params),
        )  # fmt: skip
        write_json(path.with_suffix(".parity.json"), checked)
        report["files"].append(summary(path.name, checked))
        print(f"{row} {mode}: {path.name}, {path.stat().st_size / 1e6:.2f} MB, parity passed")
        make_variants(params, system, path, data, adversarial, report)
    if not report["files"]:
        raise UserError(f"export.models: {row} has nothing to export: {'; '.join(report['refused'].values())}")
    return report


def options_of(params: Params) -> ExportOptions:
    """How files are written."""
    from casemate.deploy.export import ExportOptions

    export = params.export
    return ExportOptions(
        export.layout, export.purified, export.conv, "auto", export.opset, export.draws, export.noise
    )  # fmt: skip


def make_variants(
    params: Params, system: System, path: Path, data: Loaded, adversarial: Labelled | None, report: dict[str, Any]
) -> None:
    """The variants of one file beside it, and what is left of each under attack into `report`."""
    from casemate.deploy.variants import make_variant
    from casemate.errors import UserError

    calibration = data.train.images[:200].transpose(0, 3, 1, 2).astype("float32") / 255
    for variant in params.export.variants:
        made = path.with_name(f"{path.stem}.{variant}.onnx")
        try:
            make_variant(path, made, variant, calibration)
        except UserError as error:
            report["refused"][made.stem] = str(error)
            print(f"{report['row']} {made.stem} is left out: {error}")
            continue
        line = variant_line(params, system, path, made, data, adversarial)
        report["variants"].append({"file": made.name, "variant": variant, **line})
        print(f"{report['row']} {made.stem}: {made.stat().st_size / 1e6:.2f} MB, "
              f"{100 * line['served']['accuracy']:.1f} % left of {line['served']['n']}")  # fmt: skip


def variant_line(
    params: Params, system: System, path: Path, made: Path, data: Loaded, adversarial: Labelled | None
) -> dict[str, Any]:
    """{"agreement" with the float32 file on clean images, "stored": accuracy on the stored adversarial images,
    "clean", "served", "left": of black-box attacks and transfer through ONNX Runtime}."""
    import torch

    from casemate.deploy.onnx_system import OnnxSystem
    from casemate.deploy.served import Search, attack_file
    from casemate.evaluation.images import EvaluationSet, evaluation_order
    from casemate.threat import ThreatModel

    export, test = params.export, EvaluationSet(data.test)
    x, y = test.take(evaluation_order(len(test))[: export.attack_images])
    file, whole = OnnxSystem(made, "cpu"), OnnxSystem(path, "cpu")
    assert file.metadata is not None
    threat = ThreatModel(file.metadata.about.norm, file.metadata.about.radius)  # type: ignore[arg-type]
    search = Search(export.attack_queries)
    stored = None
    if adversarial is not None:
        right = sum(
            int((file.decide(part) == torch.tensor(labels).long()).sum()) for part, labels in adversarial.batches()
        )
        stored = {"accuracy": right / len(adversarial), "n": len(adversarial)}
    return {
        "agreement": float((file.decide(x) == whole.decide(x)).float().mean()), "stored": stored,
        **attack_file(file, x, y, threat, search, source=system).report(),
    }  # fmt: skip


def summary(file: str, report: dict[str, Any]) -> dict[str, Any]:
    """The parity report as the leaderboard's page shows it."""
    numbers = [{k: check[k] for k in ("name", "value", "bound", "passed")} for check in report["checks"]]
    return {"file": file, "form": report["form"], "passed": report["passed"], "numbers": numbers}


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row of `export.models` in params.yaml"})
