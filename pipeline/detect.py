"""Stage detect: fit detectors to one trained classifier, judge them on test images, and store them.

python -m pipeline.detect --row standard

Without --row it lists the rows that have detectors, for the report.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.common import attack_bar, device_of, recording, row_of, stage, write_json
from pipeline.train import RAW, training_data

if TYPE_CHECKING:
    from casemate.evaluation.detection_protocol import Attacks, Progress, Protocol
    from casemate.evaluation.detection_schema import DetectParams
    from casemate.networks.base import Classifier
    from casemate.params import Params
    from casemate.tracking import MlflowRecorder


def run(params: Params, options: argparse.Namespace) -> None:
    if options.row is None:
        write_json(params.reports_dir / "detect" / "index.json", list(params.detect))
        return
    row = row_of(params, options.row, list(params.detect), "detect")
    with recording(params, "detect", row) as recorder, attack_bar() as progress:
        judge(params, row, recorder, progress)


def judge(params: Params, row: str, recorder: MlflowRecorder, progress: Progress) -> None:
    """Run the experiment on test images, store detectors fitted on validation images, write the report's file."""
    from casemate.evaluation.detection_protocol import deployable, run_protocol, save_detector
    from casemate.registry import resolve
    from casemate.tracking import detection_metrics

    wanted, device = params.detect[row], device_of(params)
    classifier, card = victim(params, row, device)
    detectors = {name: resolve("detector", d.method)(**d.options) for name, d in wanted.detectors.items()}
    attacks = attacks_of(params, wanted)
    train, validation, test = images(params, wanted, device)
    table = run_protocol(classifier, detectors, attacks, train, test, protocol_of(params, wanted), progress)
    fitted = deployable(classifier, detectors, attacks[wanted.fitted_to], train, validation, params.seed, progress)
    out = params.models_dir / "detectors" / row
    shutil.rmtree(out, ignore_errors=True)
    facts = {"row": row, "fitted_on": wanted.fitted_to, "natural": len(validation[0]), "budget": params.budget}
    for name, detector in fitted.items():
        save_detector(out / name, wanted.detectors[name].method, detector, **facts, seed=params.seed)
    write_json(out / "index.json", sorted(fitted))
    report = params.reports_dir / "detect" / f"{row}.json"
    write_json(report, {
        "schema": 1, "profile": params.profile, "row": row, "method": card["defense"]["method"],
        "network": card["network"]["name"], "dataset": params.dataset, "budget": params.budget,
        "detectors": {n: d.model_dump() for n, d in wanted.detectors.items()},
        "stored": {"fitted_on": wanted.fitted_to, "natural": len(validation[0]), "detectors": sorted(fitted)},
        **table,
    })  # fmt: skip
    recorder.params({"row": row, **wanted.model_dump()})
    recorder.metrics(detection_metrics(table))
    recorder.output(report)


def victim(params: Params, row: str, device: str) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a trained row, and its card. Raises UserError where more than a classifier answers."""
    from casemate.errors import UserError
    from casemate.networks.base import Classifier
    from casemate.training.artifact import load_artifact, load_system

    folder = params.models_dir / "trained" / row
    system = load_system(folder, device=device)
    classifier = getattr(system, "classifier", None)
    if system.changes_inference or not isinstance(classifier, Classifier):
        raise UserError(f"detect.{row}: a detector reads a plain classifier, and {row} changes its inference")
    return classifier, load_artifact(folder)[1]


def attacks_of(params: Params, wanted: DetectParams) -> Attacks:
    """The attacks with their threat models, steps scaled by the budget."""
    from casemate.evaluation.plan import bind_source, build_attack
    from casemate.threat import ThreatModel

    made = {}
    for name, given in wanted.attacks.items():
        threat, attack = given.threat or params.threat, build_attack(name, given, params.budget, bind_source(None))
        assert attack is not None  # `bind_source` leaves none out
        made[name] = attack, ThreatModel(threat.norm, threat.radius)
    return made


def protocol_of(params: Params, wanted: DetectParams) -> Protocol:
    """How the experiment is run; the joint attack's steps are scaled by the budget, too."""
    from casemate.attacks.joint import Joint
    from casemate.evaluation.detection_protocol import Protocol
    from casemate.evaluation.plan import scaled

    plain = Protocol(share=wanted.share, splits=wanted.splits, seed=params.seed)
    if wanted.adaptive is None:
        return plain
    joint: Any = scaled(Joint(**wanted.adaptive.options), params.budget)
    return replace(plain, adaptive=joint, adaptive_images=wanted.adaptive.images)


def images(params: Params, wanted: DetectParams, device: str) -> Any:
    """(images, labels) for training, validation and test, on the device; as many as the parameters ask for."""
    import torch

    from casemate.data import load_dataset
    from casemate.evaluation.images import EvaluationSet, evaluation_order

    data = training_data(params, device)
    # Every prefix of the training split is stratified.
    count = len(data.train) if wanted.train_images == "all" else min(wanted.train_images, len(data.train))
    train, validation = (
        (part.x(torch.arange(n, device=part.device)), part.labels[:n])
        for part, n in ((data.train, count), (data.validation, len(data.validation)))
    )
    test = EvaluationSet(load_dataset(params.dataset, RAW).test, device)
    order = evaluation_order(len(test))[: None if wanted.images == "all" else wanted.images]
    return train, validation, test.take(order)


if __name__ == "__main__":
    stage(run, doc=__doc__, optional={"row": "a row of `detect` in params.yaml; without it, list them all"})
