"""A network as it came: nothing moves, and what comes out is the same classifier."""

from __future__ import annotations

from typing import Any

import torch
from attack_toys import digits, trained_network
from torch import nn

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.given import Given
from casemate.threat import ThreatModel
from casemate.trainable import Task
from casemate.training.loop import train
from casemate.training.recipe import Recipe


def test_nothing_is_trained_and_one_epoch_measures() -> None:
    x, y = (part[:80] for part in digits())
    pixels = (x.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    data, recipe = DeviceData(Images(pixels, y.numpy())), Recipe(epochs=1, lr=1.0, batch_size=40)
    given: Any = trained_network()
    before = {name: value.clone() for name, value in given.state_dict().items()}

    def fresh() -> nn.Module:
        made: nn.Module = trained_network()
        return made

    task = Task((1, 8, 8), 10, ThreatModel("linf", 0.1), fresh, recipe.player)
    done = train(Given(), task, data, data, recipe, seed=0, device="cpu")
    after = done.modules["classifier"].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert done.epochs == 1 and done.curves[-1]["val_clean"] > 0.9 > done.curves[-1]["val_robust"]
