"""A detector as part of a graph: its log odds, less its threshold, beside the classifier's logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from casemate.detectors.density import KernelDensity, log_kernel_density, read
from casemate.detectors.fitting import FittedDetector
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.system import Detector


class ClassDensities(nn.Module):
    """`KernelDensity` without choosing rows by the predicted class: every density, then the predicted one's."""

    def __init__(self, scorer: KernelDensity) -> None:
        super().__init__()
        self.reads, self.every_class, self.classes = scorer.reads, scorer.every_class, len(scorer.bandwidth)
        for name in ("shift", "scale"):
            self.register_buffer(name, getattr(scorer, name))
        for c in range(self.classes):
            own = scorer.references[int(scorer.starts[c]) : int(scorer.starts[c + 1])]
            self.register_buffer(f"references{c}", own.clone())
            self.register_buffer(f"bandwidth{c}", scorer.bandwidth[c].clone())

    def forward(self, classifier: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = read(classifier, x, self.reads)
        at = (features - self.get_buffer("shift")) / self.get_buffer("scale")
        scores = torch.stack([self._log_density(at, c) for c in range(self.classes)], 1)
        return (scores if self.every_class else scores.gather(1, logits.argmax(1, keepdim=True))), logits

    def _log_density(self, at: Tensor, c: int) -> Tensor:
        return log_kernel_density(at, self.get_buffer(f"references{c}"), self.get_buffer(f"bandwidth{c}"))


class Readout(nn.Module):
    """image -> (log odds of "adversarial" less the threshold (N,), logits N x classes): `FittedDetector.readout`."""

    def __init__(self, detector: FittedDetector) -> None:
        super().__init__()
        self.classifier, self.regression = detector.classifier, detector.regression
        scorer = detector.scorer
        self.scorer = ClassDensities(scorer) if isinstance(scorer, KernelDensity) else scorer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, logits = self.scorer(self.classifier, x)
        return self.regression(scores) - self.regression.threshold, logits


def readout_of(detector: Detector, sample: Tensor) -> Readout:
    """The detector as a module, what it works out once being worked out. Raises UserError for one that is not fitted
    and fixed."""
    fitted = require_fitted(detector)
    with torch.no_grad():
        fitted.readout(sample)  # activations of references, kept by the scorer
    return Readout(fitted)


def require_fitted(detector: Detector) -> FittedDetector:
    """Raises UserError for a detector whose score is no fixed function of the image."""
    if not isinstance(detector, FittedDetector) or not detector.scorer.deployable:
        raise UserError(
            f"detector {type(detector).__name__}: its score is no fixed function of an image: not exported"
        )
    if not detector.scorer.exportable:
        raise UserError(f"detector {type(detector.made).__name__}: its score is a search: not exported")
    return detector
