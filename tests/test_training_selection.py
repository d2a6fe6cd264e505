"""Early stopping by selection (Rice et al. 2020): what measures it, and that the test set has no part in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stepping import Probe
from torch import nn
from training_toys import data, linear, recipe, run

from casemate.data import Loaded
from casemate.defenses.at_pgd import ATPGD
from casemate.threat import ThreatModel
from casemate.trainable import Task
from casemate.training.loop import Trained, train
from pipeline.train import TrainingSet

PARAMS: Any = SimpleNamespace(dataset="digits", validation=120, seed=0, train_size=300)


class Sealed:
    """A loaded dataset whose test images raise as soon as anybody asks for them."""

    def __init__(self, loaded: Loaded) -> None:
        self.dataset, self.train = loaded.dataset, loaded.train

    @property
    def test(self) -> None:
        raise AssertionError("training has asked for the test set")


def sealed(digits: Loaded, monkeypatch: pytest.MonkeyPatch) -> TrainingSet:
    monkeypatch.setattr("casemate.data.load_dataset", lambda name, root: Sealed(digits))
    return TrainingSet(PARAMS, "cpu")


def selected(data: TrainingSet, **changes: Any) -> Trained:
    made = recipe(epochs=6, lr=0.5, batch_size=50, select="best", **changes)
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # noqa: E731
    task = Task((1, 8, 8), 10, ThreatModel("linf", 0.1), network, made.player)
    return train(ATPGD(steps=2), task, data.train, data.validation, made, seed=0, device="cpu")


def test_a_run_that_selects_the_best_epoch_never_asks_for_the_test_set(
    digits: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = selected(sealed(digits, monkeypatch))
    scores = [row["val_robust"] for row in trained.curves]
    assert trained.chosen_epoch == 1 + scores.index(max(scores)) and len(set(scores)) > 1


def test_what_selects_is_held_out_of_the_training_images(digits: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    split = sealed(digits, monkeypatch)
    known = {image.tobytes(): i for i, image in enumerate(digits.train.images)}
    parts = [
        {known[np.ascontiguousarray(image).tobytes()] for image in part.images.permute(0, 2, 3, 1).numpy()}
        for part in (split.train, split.validation)
    ]
    assert (len(split.train), len(split.validation)) == (300, 120)
    assert not parts[0] & parts[1] and len(parts[1]) > 115, "a few digits may be equal"


def test_best_and_last_are_both_in_the_curves(digits: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    split = sealed(digits, monkeypatch)
    best = selected(split)
    rows = {row["epoch"]: row for row in best.curves}
    assert rows[best.chosen_epoch]["val_robust"] >= best.curves[-1]["val_robust"] and len(rows) == 6


def test_it_is_measured_by_pgd_10_in_quarters_of_the_radius() -> None:
    """One clean pass, ten of the attack and one of the result, every epoch, and none of them in train mode."""
    probes: list[Probe] = []

    def network() -> nn.Module:
        net = linear()
        probes.append(Probe(net).__enter__())
        return net

    run(ATPGD(steps=1), recipe(epochs=2), network=network, val_data=data(30, 1))
    held_out = [(seen, mode) for seen, mode in zip(probes[0].inputs, probes[0].train, strict=True) if len(seen) == 30]
    assert len(held_out) == 2 * 12 and not any(mode for _, mode in held_out)
    clean, start, first = (seen for seen, _ in held_out[:3])
    moves = (first - start).abs()
    assert float(moves.max()) == pytest.approx(0.1 / 4, abs=1e-6)
    assert float((start - clean).abs().max()) <= 0.1 + 1e-6
    assert torch.equal(held_out[1][0], held_out[13][0]), "every epoch from the same start"
