"""Small systems and attacks for the evaluation's tests, and hand-made cells."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost
from casemate.data.base import Images
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Cell
from casemate.fields import Natural, spec
from casemate.seeding import generator
from casemate.system import Offer, TorchSystem, View
from casemate.threat import Goal, ThreatModel

SHAPE = (1, 4, 4)
BALL = ThreatModel("linf", 0.1)


def linear(seed: int = 0) -> TorchSystem:
    """Three classes of 1 x 4 x 4 images, linear."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return TorchSystem(model, input_shape=SHAPE, num_classes=3, name="linear")


def images(system: TorchSystem, n: int = 60, wrong: int = 5) -> EvaluationSet:
    """Random images with the labels that `system` gives, but for the first `wrong`."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
    unlabelled = EvaluationSet(Images(pixels, np.zeros(n, np.int64)))
    labels = system.decide(unlabelled.take(range(n))[0]).numpy()
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return EvaluationSet(Images(pixels, labels))


@spec
class Jitter(Attack):
    """One random corner of the ball. Remembers the chunks it was run on; waits `pause` seconds for each."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    chunks: ClassVar[list[int]] = []
    pause: ClassVar[float] = 0.0

    flavour: Natural = 0

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        self.chunks.append(len(x))
        time.sleep(self.pause)
        noise = torch.randn(x.shape, generator=generator("jitter", seed, self.flavour)).sign()
        cost.queries += 1
        return threat.project(x + threat.radius * noise, x)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n


def cell(
    success: Sequence[int], clean_error: Sequence[int], *, indices: Sequence[int] | None = None,
    asked: int | None = None, linf: float = 0.1, l2: float = 0.2, cured: Sequence[int] = (),
) -> Cell:  # fmt: skip
    """A cell from 0/1 columns: label 0, wrong predictions 1. `cured`: clean errors that the attack made right."""
    n = len(success)
    wrong = np.asarray(clean_error, bool)
    down = np.asarray(success, bool)
    prediction = np.where(down | wrong, 1, 0)
    prediction[list(cured)] = 0
    ones = np.ones(n, np.int64)
    rows = {
        "index": np.arange(n) if indices is None else np.asarray(indices), "label": 0 * ones,
        "clean_prediction": wrong.astype(np.int64), "prediction": prediction, "success": down | wrong,
        "linf": np.full(n, linf, np.float32), "l2": np.full(n, l2, np.float32),
        "forwards": 3 * ones, "backwards": 2 * ones, "queries": 0 * ones,
    }  # fmt: skip
    return Cell({}, rows, n if asked is None else asked, 16)


def segments(root: Path) -> list[Path]:
    """Every segment of a ledger that holds an attack's or the clean rows."""
    return sorted(root.rglob("*.parquet"))
