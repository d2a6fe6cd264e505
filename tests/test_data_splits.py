"""Splits: disjoint, stratified, nested, and the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from casemate.data import Loaded, splits
from casemate.errors import UserError

LABELS = np.repeat(np.arange(4), [400, 300, 200, 100])


def test_a_shuffle_is_a_permutation_written_down_by_hand() -> None:
    # splitmix64 by hand in plain integers: a library's generator may change, this may not
    from casemate.seeding import derive

    def key(index: int) -> int:
        mask = 2**64 - 1
        z = (derive(5, "x") + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert splits.shuffled(50, 5, "x").tolist() == sorted(range(50), key=key)
    assert splits.shuffled(6, 0).tolist() != splits.shuffled(6, 1).tolist()


def test_train_and_validation_share_nothing_and_keep_the_class_proportions() -> None:
    split = splits.split_train(LABELS, validation=100, seed=3)
    assert len(split.validation) == 100 and len(split.train) == 900
    assert sorted([*split.train, *split.validation]) == list(range(1000))
    assert np.abs(np.bincount(LABELS[split.validation]) - [40, 30, 20, 10]).max() <= 1
    assert (np.diff(split.validation) > 0).all()


def test_train_size_is_a_stratified_prefix() -> None:
    whole = splits.split_train(LABELS, validation=100, seed=3)
    part = splits.split_train(LABELS, validation=100, seed=3, train_size=200)
    assert part.train.tolist() == whole.train[:200].tolist()
    assert part.validation.tolist() == whole.validation.tolist()
    assert np.abs(np.bincount(LABELS[part.train]) - [80, 60, 40, 20]).max() <= 1
    assert (np.diff(part.train) < 0).any()  # shuffled, not sorted by class or number


def test_the_seed_decides() -> None:
    one, same, other = (splits.split_train(LABELS, 100, seed) for seed in (1, 1, 2))
    assert one.train.tolist() == same.train.tolist()
    assert one.validation.tolist() != other.validation.tolist()


def test_every_prefix_of_a_stratified_order_keeps_the_proportions() -> None:
    order = splits.stratified_order(LABELS, "seed")
    counts = np.stack([np.cumsum(LABELS[order] == c) for c in range(4)], axis=1)
    expected = np.arange(1, 1001)[:, None] * np.array([0.4, 0.3, 0.2, 0.1])
    assert np.abs(counts - expected).max() < 2


def test_subsets_of_the_test_set_are_nested_and_sorted() -> None:
    small, large = splits.evaluation_subset(10_000, 100), splits.evaluation_subset(10_000, 1000)
    assert set(small) <= set(large) and len(set(large)) == 1000
    assert (np.diff(large) > 0).all() and large[0] >= 0 and large[-1] < 10_000
    assert splits.evaluation_subset(7, 7).tolist() == list(range(7))


@pytest.mark.parametrize("n", [0, 11])
def test_a_subset_that_is_not_there_is_an_error(n: int) -> None:
    with pytest.raises(UserError, match=r"1\.\.10"):
        splits.evaluation_subset(10, n)


def test_too_large_splits_are_errors() -> None:
    with pytest.raises(UserError, match="validation split of 1,000"):
        splits.split_train(LABELS, 1000, 0)
    with pytest.raises(UserError, match=r"train_size 901 is not within 1\.\.900"):
        splits.split_train(LABELS, 100, 0, train_size=901)
    with pytest.raises(UserError, match="train_size 0"):
        splits.split_train(LABELS, 100, 0, train_size=0)


def test_take(digits: Loaded) -> None:
    part = splits.take(digits.train, np.array([5, 2]))
    assert (part.images[0] == digits.train.images[5]).all() and part.labels[1] == digits.train.labels[2]
