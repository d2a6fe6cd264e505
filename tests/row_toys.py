"""One row on digits, with a purifying system or without, for the tests of its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attack_toys import trained_network
from torch import Tensor, nn

from casemate.data import Loaded
from casemate.data.base import Images
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.suite import About, Candidate, RowEvaluation, evaluate_row
from casemate.system import Purification, TorchSystem, View, identity_backward
from casemate.threat import ThreatModel

ABOUT = About("smoke", "row", "standard", "digits", "digits_cnn", tuple("0123456789"), {"effective_epochs": 2.0})
SUITES: dict[str, Any] = {
    "core": {"attacks": {"pgd": {"attack": "pgd", "options": {"steps": 8}}}},
    "extended": {
        "images": 60,
        "attacks": {
            "fgsm": {"attack": "fgsm", "view": "adaptive"},
            "l2": {"attack": "pgd", "options": {"steps": 8}, "threat": {"norm": "l2", "radius": 1.0}},
        },
    },
}


def params(**changes: Any) -> EvaluateParams:
    given = {"chunk": 40, "subset": 40, "secondary_images": 50, "suites": SUITES, "gate": None}
    return EvaluateParams.model_validate({**given, **changes})


class Shift(Purification):
    """A purification that moves every pixel by a constant."""

    passes = (1, 1)
    spec: dict[str, Any] = {"shift": 0.02}  # noqa: RUF012
    modules: Sequence[nn.Module] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return (x + 0.02).clamp(0, 1).detach()

    def score(self, x: Tensor) -> Tensor:
        return torch.ones(len(x))

    def views(self, classifier: Any) -> dict[str, View]:
        return {"adaptive": identity_backward(classifier, self)}


def plain() -> TorchSystem:
    return TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)


def purified() -> TorchSystem:
    return TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())


def toy_set(digits: Loaded) -> EvaluationSet:
    """The first 120 test images."""
    return EvaluationSet(Images(digits.test.images[:120], digits.test.labels[:120]))


def evaluate(
    root: Path, data: EvaluationSet, candidates: list[Candidate], given: EvaluateParams | None = None,
    said: list[str] | None = None, **options: Any,
) -> RowEvaluation:  # fmt: skip
    about = options.pop("about", ABOUT)
    given = given or params()
    say = (said if said is not None else []).append
    ledger = Ledger(root, given.chunk)
    return evaluate_row(about, candidates, data, ThreatModel("linf", 0.1), given, ledger, say=say, **options)


def whole_row(root: Path, data: EvaluationSet) -> RowEvaluation:
    """A purifying system in full, with the classifier alone as a second mode."""
    candidates = [Candidate(purified(), "imt"), Candidate(plain(), "off", primary=False)]
    given = params(sweep={"attack": "pgd", "options": {"steps": 4}, "radii": [0, 0.05, 0.1], "images": 60})
    return evaluate(root, data, candidates, given, seed=3)
