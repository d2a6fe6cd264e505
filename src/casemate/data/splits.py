"""Which images are for what: seeded, stratified, and the same on every machine and library version.

The order comes from a hash of (seed, index), not from a random generator, whose streams libraries may change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from casemate.data.base import Images
from casemate.errors import UserError
from casemate.seeding import derive

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class TrainSplit(NamedTuple):
    """Disjoint indices into the training images."""

    train: np.ndarray
    """int64, in shuffled order: the first n are a stratified subset for every n."""
    validation: np.ndarray
    """int64, sorted."""


def shuffled(n: int, *seed: object) -> np.ndarray:
    """A permutation of 0..n-1 (int64): indices ordered by splitmix64(seed, index)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(derive(*seed))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").astype(np.int64)


def stratified_order(labels: np.ndarray, *seed: object) -> np.ndarray:
    """A shuffled order (int64) in which every prefix holds each class in proportion, to within two images.

    The j-th image of a class with n images stands at (j + u) / n on a line from 0 to 1, u in [0, 1) of its class.
    """
    order = shuffled(len(labels), *seed)
    places = np.empty(len(labels))
    classes = np.unique(labels)
    starts = (shuffled(len(classes), *seed, "classes") + 0.5) / max(len(classes), 1)
    for start, label in zip(starts, classes, strict=True):
        mine = order[labels[order] == label]
        places[mine] = (np.arange(len(mine)) + start) / len(mine)
    return order[np.argsort(places[order], kind="stable")]


def split_train(labels: np.ndarray, validation: int, seed: int, train_size: int | None = None) -> TrainSplit:
    """Take `validation` images out of the training set, then `train_size` of the rest (all, if None).

    Both are stratified by `labels` (N,) and depend on `seed` alone: a smaller `train_size` is a prefix of a larger.
    Raises UserError if there are too few images.
    """
    n = len(labels)
    if not 0 <= validation < n:
        raise UserError(f"a validation split of {validation:,} of {n:,} training images leaves none to train on")
    rest = n - validation
    if train_size is not None and not 1 <= train_size <= rest:
        raise UserError(
            f"train_size {train_size:,} is not within 1..{rest:,} ({n:,} less {validation:,} for validation)"
        )
    order = stratified_order(labels, seed, "validation")
    held, free = np.sort(order[:validation]), np.sort(order[validation:])
    train = free[stratified_order(labels[free], seed, "train")]
    return TrainSplit(train[:train_size], held)


def evaluation_subset(n_total: int, n: int, seed: int = 0) -> np.ndarray:
    """`n` of the test images' indices 0..n_total-1, sorted (int64), the same for every model.

    A smaller n is a part of a larger. Raises UserError if there are not that many.
    """
    if not 1 <= n <= n_total:
        raise UserError(f"a subset of {n:,} images is not within 1..{n_total:,}, the images there are")
    return np.sort(shuffled(n_total, seed, "evaluation subset")[:n])


def take(images: Images, indices: np.ndarray) -> Images:
    """The images of those indices, in that order."""
    return Images(images.images[indices], images.labels[indices])
