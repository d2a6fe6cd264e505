"""Stage export: a trained row as ONNX in every inference mode, each with a parity report; none is left that fails it.

python -m pipeline.export --row atld
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common import device_of, md5, recording, row_of, stage, write_json

if TYPE_CHECKING:
    from casemate.data import Images
    from casemate.params import Params

RAW = Path("data/raw")


def run(params: Params, options: argparse.Namespace) -> None:
    from casemate.data import load_dataset

    row = row_of(params, options.row, params.export.models, "export.models")
    device_of(params)  # sets the threads; files are made and compared on the CPU
    out, test = params.models_dir / "exported" / row, load_dataset(params.dataset, RAW).test
    making = out.with_name(f".{row}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    with recording(params, "export", row) as recorder:
        files = export_modes(params, row, test, making)
        shutil.rmtree(out, ignore_errors=True)
        making.rename(out)
        write_json(params.reports_dir / "export" / f"{row}.json", {"row": row, "files": files})
        example = test.images[:1].transpose(0, 3, 1, 2).astype("float32") / 255
        for file in files:
            path = out / file["file"]
            recorder.metrics({f"parity/{file['form']}/{n['name']}": n["value"] for n in file["numbers"]})
            recorder.model(
                path, example=example if params.export.layout == "float32-nchw" else test.images[:1],
                registered=f"casemate-{params.profile}",
                tags={"casemate.row": row, "casemate.mode": path.stem, "dvc.out.md5": md5(path)},
            )  # fmt: skip


def export_modes(params: Params, row: str, test: Images, out: Path) -> list[dict[str, Any]]:
    """One file per inference mode, named after it, its parity report beside it. Raises UserError if parity fails."""
    import numpy as np

    from casemate.deploy.export import ExportOptions
    from casemate.deploy.metadata import about_card
    from casemate.deploy.parity import Labelled, export_with_parity
    from casemate.registry import resolve
    from casemate.training.artifact import load_artifact, load_system

    trained = params.models_dir / "trained" / row
    _, card = load_artifact(trained)
    about = about_card(card, row)
    export = params.export
    written = ExportOptions(export.layout, export.purified, export.conv, "auto", export.opset)
    with np.load(params.models_dir / "evaluated" / row / "adversarial.npz") as kept:
        adversarial = Labelled(kept["x_adv"], kept["labels"]) if len(kept["labels"]) else None
    files = []
    for mode in resolve("defense", params.rows[row].method).inference_modes:
        path = out / f"{mode}.onnx"
        report = export_with_parity(
            load_system(trained, mode), path, about, Labelled(test.images, test.labels),
            adversarial=adversarial, n=export.parity_images, options=written,
        )  # fmt: skip
        write_json(path.with_suffix(".parity.json"), report)
        files.append(summary(path.name, report))
        print(f"{row} {mode}: {path.name}, {path.stat().st_size / 1e6:.2f} MB, parity passed")
    return files


def summary(file: str, report: dict[str, Any]) -> dict[str, Any]:
    """The parity report as the leaderboard's page shows it."""
    numbers = [{k: check[k] for k in ("name", "value", "bound", "passed")} for check in report["checks"]]
    return {"file": file, "form": report["form"], "passed": report["passed"], "numbers": numbers}


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row of `export.models` in params.yaml"})
