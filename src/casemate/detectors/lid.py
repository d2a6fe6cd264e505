"""LID (Ma et al. 2018): local intrinsic dimensionality of an image's activations, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from casemate.detectors.fitting import DetectorSpec, Scorer
from casemate.errors import UserError
from casemate.fields import Count, spec
from casemate.networks.base import Classifier
from casemate.seeding import generator
from casemate.system import frozen

SMALLEST = 1e-12
"""Added to distances."""
FLATTEST = -1e-6
"""The largest mean log ratio: neighbours that are all equally far would give an infinite dimensionality."""


class Dimensionality(Scorer):
    """Estimates of LID at the input, at every layer and at the logits, from the `k` nearest of a batch of references.

    `images` are the references. Where there are none, images are scored in batches of `batch` against the clean
    originals of the batch, the nearest neighbour left out: for a clean image that is itself, and for an adversarial
    one most often its own original, which is a leak.
    """

    images: Tensor

    def __init__(self, k: int, batch: int, images: Tensor) -> None:
        super().__init__()
        self.k, self.batch = k, batch
        self.register_buffer("images", images)
        self._cache: list[Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dimensionality:
        """To another device or type, where the activations are worked out anew."""
        self._cache = None
        moved: Dimensionality = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    @property
    def deployable(self) -> bool:
        return len(self.images) > 0

    @property
    def together(self) -> int:
        return 1 if self.deployable else self.batch

    def forward(self, classifier: Classifier, x: Tensor, originals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = activations(classifier, x)
        logits = seen[-1]
        if self.deployable:
            pairs = zip(seen, self._references(classifier), strict=True)
            return torch.stack([dimensionality(a, r, self.k) for a, r in pairs], 1), logits
        if originals is None or len(originals) != len(x):
            raise UserError("LID with reference: batch needs the clean originals of the images it scores")
        if len(x) < self.k + 2:
            raise UserError(f"LID with k = {self.k} needs a batch of {self.k + 2} images, and has {len(x)}")
        with torch.no_grad():
            clean = activations(classifier, originals)
        parts = []
        for first in range(0, len(x), self.batch):
            rows = slice(first, first + self.batch)
            # The last batch is filled up with images of the one before.
            beside = slice(max(0, min(first, len(x) - self.batch)), first + self.batch)
            scores = [dimensionality(a[rows], r[beside], self.k, skip=1) for a, r in zip(seen, clean, strict=True)]
            parts.append(torch.stack(scores, 1))
        return torch.cat(parts), logits

    def _references(self, classifier: Classifier) -> list[Tensor]:
        """Activations of the references, worked out once: the classifier is frozen."""
        if self._cache is None:
            with torch.no_grad(), frozen(classifier):
                self._cache = activations(classifier, self.images)
        return self._cache


@spec
class LID(DetectorSpec):
    """Min-max scaled estimates and a logistic regression with a cross-validated C."""

    scaling: ClassVar[Literal["standard", "minmax"]] = "minmax"

    k: Count = 20
    batch: Count = 100
    """References, or images in a batch."""
    reference: Literal["training", "batch"] = "training"
    """A fixed batch of training images; or, as published, the clean originals of the images that are scored, which
    cannot be deployed and measures how near an adversarial image is to its own original."""
    regression: Literal["plain", "cross_validated"] = "cross_validated"

    def __post_init__(self) -> None:
        if self.batch < self.k + 2:
            raise UserError(f"LID: a batch of {self.batch} is too small for {self.k} neighbours")

    def scorer(self, classifier: Classifier, x: Tensor, y: Tensor, seed: int = 0) -> Dimensionality:
        if self.reference == "batch":
            return Dimensionality(self.k, self.batch, x[:0])
        if len(x) < self.batch:
            raise UserError(f"LID: there are {len(x)} training images, and a batch of {self.batch} is needed")
        chosen = torch.randperm(len(x), generator=generator("lid", seed))[: self.batch].to(x.device)
        return Dimensionality(self.k, self.batch, x[chosen].clone())

    def restore(self, tensors: dict[str, Tensor]) -> Dimensionality:
        return Dimensionality(self.k, self.batch, **tensors)


def activations(classifier: Classifier, x: Tensor) -> list[Tensor]:
    """The input, every layer and the logits (last), each N x d."""
    seen = classifier.taps(x, [*classifier.layers, "head"])
    return [x.flatten(1), *(seen[name].flatten(1) for name in classifier.layers), seen["head"]]


def dimensionality(x: Tensor, references: Tensor, k: int, *, skip: int = 0) -> Tensor:
    """(N,) maximum likelihood estimates -1 / mean_i log(r_i / r_k) from the k nearest references (n x d).

    `skip` nearest ones are left out. The gradient is that of the distances to the neighbours found.
    """
    centre = references.mean(0)
    distances = torch.cdist(x - centre, references - centre) + SMALLEST
    nearest = distances.topk(k + skip, dim=1, largest=False).values[:, skip:]
    mean = (nearest / nearest[:, -1:]).log().mean(1)
    return -1 / mean.clamp(max=FLATTEST)
