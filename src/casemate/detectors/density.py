"""Kernel density of a classifier's features under the class it predicts (Feinman et al. 2017).

What KD and the ER-Detector have in common: they differ in what is read, and in the classifier.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from casemate.detectors.fitting import CHUNK, DetectorSpec, Scorer
from casemate.errors import UserError
from casemate.fields import Count, Flag, Positive, spec
from casemate.networks.base import Classifier
from casemate.seeding import generator
from casemate.system import frozen

Reads = Literal["code", "channels", "layers"]

BANDWIDTHS = torch.logspace(-1, 1, 20, dtype=torch.float64)
"""The values that are tried."""
HELD_OUT = 0.2
"""Share of each class's references that the bandwidth is chosen by."""


class KernelDensity(Scorer):
    """One Gaussian kernel density per class; log densities are the scores, low for what is far from the class.

    `references` (n x D, standardised) are sorted by class, those of class c being rows `starts[c]` to
    `starts[c + 1]`; `bandwidth` is one per class.
    """

    references: Tensor
    starts: Tensor
    shift: Tensor
    scale: Tensor
    bandwidth: Tensor

    def __init__(self, reads: Reads, every_class: bool, **tensors: Tensor) -> None:
        super().__init__()
        self.reads, self.every_class = reads, every_class
        for name in ("references", "starts", "shift", "scale", "bandwidth"):
            self.register_buffer(name, tensors[name])

    def forward(self, classifier: Classifier, x: Tensor, originals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features, logits = read(classifier, x, self.reads)
        at = (features - self.shift) / self.scale
        if self.every_class:
            return torch.stack([self.log_density(at, c) for c in range(len(self.bandwidth))], 1), logits
        predicted = logits.argmax(1)
        order = predicted.argsort(stable=True)
        pieces = [self.log_density(at[predicted == c], c) for c in range(len(self.bandwidth))]
        return torch.cat(pieces)[order.argsort()][:, None], logits

    def log_density(self, features: Tensor, c: int) -> Tensor:
        """(N,) log density of standardised features (N x D) under class `c`."""
        own = self.references[int(self.starts[c]) : int(self.starts[c + 1])]
        return log_kernel_density(features, own, self.bandwidth[c])


@spec
class DensityDetector(DetectorSpec):
    """Base of the detectors by kernel density."""

    score: Literal["predicted", "all"] = "predicted"
    """The log density under the predicted class; or those under every class."""
    bandwidth: Positive | None = None
    """Of the kernel, for every class; without it each class has its own, the most likely of twenty from 0.1 to 10."""
    standardise: Flag = True
    """Scale every feature to mean 0 and deviation 1 on the training images."""
    per_class: Count | None = 1000
    """Training images of each class in its density, at most; null takes all."""

    @abstractmethod
    def reads(self) -> Reads:
        """What is read of the classifier."""

    def scorer(self, classifier: Classifier, x: Tensor, y: Tensor, seed: int = 0) -> KernelDensity:
        classes, rng = classifier.num_classes, generator("kernel density", seed)
        chosen = []
        for c in range(classes):
            own = (y == c).nonzero()[:, 0]
            if len(own) < 2:
                raise UserError(f"a density needs two training images of each class, and class {c} has {len(own)}")
            order = torch.randperm(len(own), generator=rng).to(own.device)
            chosen.append(own[order[: self.per_class]])
        with torch.no_grad(), frozen(classifier):
            rows = torch.cat(chosen)
            parts = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
            features = torch.cat([read(classifier, x[part], self.reads())[0] for part in parts])
        shift, scale = torch.zeros_like(features[0]), torch.ones_like(features[0])
        if self.standardise:
            shift, scale = features.mean(0), features.std(0)
            scale = torch.where(scale > 1e-6, scale, 1.0)  # a feature that never changes says nothing
        references = (features - shift) / scale
        ends = torch.tensor([0, *(len(own) for own in chosen)]).cumsum(0)
        if self.bandwidth is None:
            widths = [best_bandwidth(references[ends[c] : ends[c + 1]]) for c in range(classes)]
        else:
            widths = [self.bandwidth] * classes
        return KernelDensity(
            self.reads(), self.score == "all", references=references, shift=shift, scale=scale,
            starts=ends, bandwidth=torch.tensor(widths).to(references),
        )  # fmt: skip

    def restore(self, tensors: dict[str, Tensor]) -> KernelDensity:
        return KernelDensity(self.reads(), self.score == "all", **tensors)


def read(classifier: Classifier, x: Tensor, reads: Reads) -> tuple[Tensor, Tensor]:
    """(features N x D, logits) in one forward pass.

    "code": the input of the head. "channels": the spatial mean of every channel of every layer but the last, and the
    code; "layers": one mean for each of these layers, and the code. A layer named "pool" repeats what is before it.
    """
    if reads == "code":
        code = classifier.features(x)
        return code, classifier.head(code)
    *inner, last = classifier.layers
    inner = [name for name in inner if name != "pool"]
    seen = classifier.taps(x, [*inner, last, "head"])
    hidden = [seen[name].flatten(2).mean(2) if seen[name].dim() > 2 else seen[name] for name in inner]
    if reads == "layers":
        hidden = [means.mean(1, keepdim=True) for means in hidden]
    return torch.cat([*hidden, seen[last]], 1), seen["head"]


def log_kernel_density(x: Tensor, references: Tensor, bandwidth: Tensor) -> Tensor:
    """(N,) log of the mean of N(x; r, h^2 I) over references r (n x D)."""
    return _log_densities(squared_distances(x, references), bandwidth, references.shape[1])


def _log_densities(squared: Tensor, bandwidth: Tensor, dimensions: int) -> Tensor:
    summed = (-squared / (2 * bandwidth**2)).logsumexp(1)
    return summed - math.log(squared.shape[1]) - dimensions * (bandwidth * math.sqrt(2 * math.pi)).log()


def squared_distances(x: Tensor, references: Tensor) -> Tensor:
    """N x n squared Euclidean distances, differentiable where they are 0."""
    both = x.square().sum(1)[:, None] + references.square().sum(1)
    return (both - 2 * x @ references.T).clamp(min=0)


def best_bandwidth(references: Tensor) -> float:
    """The value of `BANDWIDTHS` under which a fifth of the references is most likely, given the others.

    Rows are in random order already.
    """
    held = max(1, round(HELD_OUT * len(references)))
    squared = squared_distances(references[:held].double(), references[held:].double())
    likelihoods = [_log_densities(squared, h, references.shape[1]).mean() for h in BANDWIDTHS.to(squared.device)]
    return float(BANDWIDTHS[int(torch.stack(likelihoods).argmax())])
