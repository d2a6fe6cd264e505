"""Stage export_detectors: the detectors of a row as ONNX, each with its classifier in one file that can reject.

Each has been through the release gate and lies with its card in a folder named after it.

python -m pipeline.export_detectors --row standard
"""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING, Any

from pipeline.common import device_of, read_json, recording, row_of, stage, write_json
from pipeline.export import RAW, options_of, summary

if TYPE_CHECKING:
    from pathlib import Path

    from casemate.deploy.onnx_system import OnnxSystem
    from casemate.deploy.served import Fallen
    from casemate.detectors.base import DetectorSystem
    from casemate.params import Params
    from casemate.threat import ThreatModel


def run(params: Params, options: argparse.Namespace) -> None:
    row = row_of(params, options.row, list(params.detect), "detect")
    device_of(params)  # sets the threads; files are made and compared on the CPU
    out = params.models_dir / "exported_detectors" / row
    making = out.with_name(f".{row}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    with recording(params, "export_detectors", row) as recorder:
        report = export_all(params, row, making)
        shutil.rmtree(out, ignore_errors=True)
        making.rename(out)
        write_json(params.reports_dir / "export_detectors" / f"{row}.json", report)
        recorder.metrics({f"served/{file['file']}": file["served"]["accuracy"] for file in report["files"]})


def export_all(params: Params, row: str, out: Path) -> dict[str, Any]:
    """One folder per stored detector: the file, its parity report, its cards; and what is left of it under attack."""
    from casemate.data import load_dataset
    from casemate.deploy import card as cards
    from casemate.deploy.metadata import about_card
    from casemate.deploy.onnx_system import OnnxSystem
    from casemate.deploy.parity import Labelled, export_with_parity
    from casemate.deploy.release import detector_card, judge_by_source
    from casemate.detectors.base import DetectorSystem
    from casemate.evaluation.detection_protocol import load_detector
    from casemate.threat import ThreatModel
    from casemate.training.artifact import load_artifact
    from pipeline.detect import victim

    classifier, card = victim(params, row, "cpu")
    trained = load_artifact(params.models_dir / "trained" / row)[1]
    stored, threat = params.models_dir / "detectors" / row, ThreatModel(params.threat.norm, params.threat.radius)
    test = load_dataset(params.dataset, RAW).test
    images = Labelled(test.images, test.labels)
    files = []
    for name in read_json(stored / "index.json"):
        detector = load_detector(stored / name, classifier)
        if not detector.scorer.exportable:
            print(f"{row} {name}: its score is a search, which no file holds: not exported")
            continue
        system = DetectorSystem(
            classifier, detector, input_shape=classifier.input_shape, num_classes=classifier.num_classes,
            name=f"{row}+{name}",
        )  # fmt: skip
        folder = out / name
        folder.mkdir()
        checked = export_with_parity(
            system, folder / cards.MODEL, about_card(trained, row), images, n=params.export.parity_images,
            options=options_of(params),
        )  # fmt: skip
        write_json(folder / "parity.json", checked)
        file = OnnxSystem(folder / cards.MODEL, "cpu")
        found = attacked(params, row, file, system, threat)
        gate = judge_by_source(found, params.release.margin, checked["checks"])
        made = detector_card(file, trained, name, found, gate, threat, profile=params.profile, budget=params.budget)
        cards.write(made, folder)
        left = found.report()
        files.append({
            **summary(f"{name}/{cards.MODEL}", checked), "detector": name, "gate": gate.passed, **left,
        })  # fmt: skip
        print(f"{row} {name}: the gate is {'passed' if gate.passed else 'NOT passed'}, "
              f"{100 * left['served']['accuracy']:.1f} % left of {left['served']['n']}")  # fmt: skip
    return {"row": row, "method": card["defense"]["method"], "files": files}


def attacked(
    params: Params, row: str, file: OnnxSystem, system: DetectorSystem, threat: ThreatModel
) -> Fallen:  # fmt: skip
    """What the joint attack on the PyTorch system, sent to the file, and black-box attacks on the file fell. An image
    that is rejected is not fooled; a clean one that is rejected is an error."""
    from casemate.data import load_dataset
    from casemate.deploy.served import Search, attack_file
    from casemate.evaluation.images import EvaluationSet, evaluation_order
    from pipeline.detect import protocol_of

    data = EvaluationSet(load_dataset(params.dataset, RAW).test)
    x, y = data.take(evaluation_order(len(data))[: params.export.attack_images])
    joint = protocol_of(params, params.detect[row]).adaptive
    return attack_file(
        file, x, y, threat, Search(params.export.attack_queries, seed=params.seed), source=system,
        attacks={} if joint is None else {"joint": joint},
    )  # fmt: skip


if __name__ == "__main__":
    stage(run, doc=__doc__, arguments={"row": "a row of `detect` in params.yaml"})
