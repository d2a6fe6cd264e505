"""How a detector is fitted: scores from a frozen classifier, a logistic regression on them, and a threshold.

A `Scorer` is fitted to training images. The regression tells scores of natural images from those of adversarial ones.
What comes out is plain tensors and numbers: a `FittedDetector`, for a `DetectorSystem` to stand behind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.fields import Unit, spec
from casemate.networks.base import Classifier
from casemate.system import frozen

CHUNK = 500
STRENGTHS = tuple(10.0**i for i in range(-4, 5))
"""The values of C that cross-validation chooses from; the strongest regularisation wins a tie."""


class Scorer(nn.Module, ABC):
    """Buffers fitted to training images, and the scores they give. The classifier is never a part of it."""

    passes: tuple[int, int] = (1, 1)
    """(forwards, backwards) of the classifier that one differentiated look at the scores costs."""
    exportable: bool = True
    """Whether the scores are one pass through a graph, as a file holds it."""

    @abstractmethod
    def forward(self, classifier: Classifier, x: Tensor, originals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scores N x S, class logits N x C) of images in [0, 1], differentiable.

        `originals` are the clean images that `x` was made from (`x` itself for natural images), which no deployed
        system has: only a scorer that says so looks at them.
        """

    @property
    def deployable(self) -> bool:
        """Whether the scores of an image need nothing but the image."""
        return True

    @property
    def together(self) -> int:
        """How many images are scored beside one another; 1 where each is scored by itself."""
        return 1


class Regression(nn.Module):
    """Log odds of "adversarial" from scores: weight . (scores - shift) / scale + bias; flagged above `threshold`."""

    shift: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    threshold: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name in ("shift", "scale", "weight", "bias", "threshold"):
            self.register_buffer(name, tensors[name])

    def forward(self, scores: Tensor) -> Tensor:
        out: Tensor = ((scores - self.shift) / self.scale) @ self.weight + self.bias
        return out


class FittedDetector:
    """A detector that can be deployed: see `casemate.system.Detector`."""

    def __init__(self, made: DetectorSpec, classifier: Classifier, scorer: Scorer, regression: Regression) -> None:
        self.made, self.classifier, self.scorer, self.regression = made, classifier, scorer, regression
        self.passes = scorer.passes

    def readout(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(log odds of "adversarial" less the threshold (N,), class logits N x C), differentiable in x."""
        scores, logits = self.scorer(self.classifier, x)
        return self.regression(scores) - self.regression.threshold, logits

    @property
    def spec(self) -> dict[str, Any]:
        """Class, options and threshold."""
        kind = type(self.made)
        options: dict[str, Any] = asdict(self.made)
        return {
            "detector": f"{kind.__module__}:{kind.__qualname__}", "options": options,
            "threshold": float(self.regression.threshold),
        }  # fmt: skip

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The scorer and the regression."""
        return [self.scorer, self.regression]


@spec
class DetectorSpec(ABC):
    """Base of every detector: a `@spec` class. It is fitted to one frozen classifier."""

    scaling: ClassVar[Literal["standard", "minmax"]] = "standard"
    """Of the scores, by those the regression is fitted to."""

    threshold: Literal["validation", "half"] = "validation"
    """Flag at the score that `false_alarms` of the natural images exceed; or at a probability of 1/2 (the papers)."""
    false_alarms: Unit = 0.05
    """Share of natural images that may be flagged."""
    regression: Literal["plain", "cross_validated"] = "plain"
    """Logistic regression with C = 1; or C from nine values by five-fold cross-validation."""

    @abstractmethod
    def scorer(self, classifier: Classifier, x: Tensor, y: Tensor, seed: int = 0) -> Scorer:
        """The scorer fitted to training images and labels. Raises UserError if there are too few."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> Scorer:
        """The scorer with those tensors, by the names of its `state_dict`."""

    def fit(
        self, classifier: Classifier, train: tuple[Tensor, Tensor], natural: Tensor, adversarial: Tensor,
        seed: int = 0,
    ) -> FittedDetector:  # fmt: skip
        """A detector from training images with labels, and natural images with what an attack made of them.

        `natural` and `adversarial` (M x C x H x W each, image i of one made from image i of the other) must not be
        training images of the classifier; the threshold comes from the natural ones.
        """
        scorer = self.scorer(classifier, *train, seed)
        if not scorer.deployable:
            raise UserError(
                f"{type(self).__name__} scores images against the clean ones they were made from, which no deployed "
                "system has: use reference: training"
            )
        scores = [scores_of(scorer, classifier, x, natural)[0] for x in (natural, adversarial)]
        return FittedDetector(self, classifier, scorer, self.regress(*scores))

    def regress(self, natural: Tensor, adversarial: Tensor) -> Regression:
        """The regression and threshold from scores (M x S and N x S). Raises UserError if one of them is empty."""
        from sklearn.linear_model import LogisticRegression

        if not len(natural) or not len(adversarial):
            raise UserError("a detector is fitted to natural and adversarial images, and one of them is missing")
        both = torch.cat([natural, adversarial]).double()
        if not bool(both.isfinite().all()):
            raise UserError(f"{type(self).__name__}: a score is not finite; a wider bandwidth or a larger k may help")
        low, high = both.amin(0), both.amax(0)
        shift, scale = (both.mean(0), both.std(0)) if self.scaling == "standard" else (low, high - low)
        scale = torch.where(scale > 0, scale, 1.0)
        target = [0] * len(natural) + [1] * len(adversarial)
        inputs = ((both - shift) / scale).cpu().numpy()
        model = LogisticRegression(C=self._strength(inputs, target), max_iter=1000).fit(inputs, target)
        made = Regression(
            shift=shift.float(), scale=scale.float(), weight=torch.tensor(model.coef_[0]).float().to(natural.device),
            bias=torch.tensor(float(model.intercept_[0])).to(natural.device),
            threshold=torch.zeros((), device=natural.device),
        )  # fmt: skip
        if self.threshold == "validation":
            made.threshold = false_alarm_threshold(made(natural), self.false_alarms)
        return made

    def _strength(self, inputs: Any, target: list[int]) -> float:
        """C of the regression."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score

        folds = min(5, sum(target), len(target) - sum(target))  # each must hold both kinds of image
        if self.regression == "plain" or folds < 2:
            return 1.0
        models = [LogisticRegression(C=c, max_iter=1000) for c in STRENGTHS]
        means = [cross_val_score(model, inputs, target, cv=folds).mean() for model in models]
        return STRENGTHS[means.index(max(means))]


def false_alarm_threshold(natural: Tensor, share: float) -> Tensor:
    """The smallest of the values (N,) that at most `share` of them lie above."""
    kept = natural.sort().values
    return kept[max(len(kept) - 1 - int(share * len(kept) + 1e-9), 0)]


def scores_of(scorer: Scorer, classifier: Classifier, x: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """(scores N x S, predicted labels (N,)) of many images, without gradients, in eval mode.

    A piece holds whole numbers of images that are scored together; a rest that is fewer goes with the piece before.
    """
    size = max(CHUNK // scorer.together, 1) * scorer.together
    firsts = range(0, max(len(x) - scorer.together + 1, 1), size)
    with torch.no_grad(), frozen(classifier, scorer):
        rows = [slice(first, last) for first, last in zip(firsts, [*firsts[1:], len(x)], strict=True)]
        parts = [scorer(classifier, x[at], originals[at]) for at in rows]
    return torch.cat([s for s, _ in parts]), torch.cat([logits.argmax(1) for _, logits in parts])
