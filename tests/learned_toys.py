"""Learned attacks fitted to the trained digits network by the real loop, in seconds."""

from __future__ import annotations

from typing import Any

import torch
from attack_toys import digits, trained_network
from sklearn.datasets import load_digits
from torch import Tensor, nn

from casemate.attacks.base import AttackResult
from casemate.attacks.learned import LearnedAttack, NeedsWeights
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.system import System, TorchSystem
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Task
from casemate.training.loop import train
from casemate.training.recipe import Recipe

LINF = ThreatModel("linf", 0.3)
SHAPE: Any = {"input_shape": (1, 8, 8), "num_classes": 10}


def weights_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def fit(spec: LearnedAttack, images: int = 1500, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """(weights, curves) of a fit on the first digits; `changes` are fields of the recipe."""
    bunch = load_digits()
    pixels = (bunch.images[:images, :, :, None] * (255 / 16)).round().astype("uint8")
    recipe = Recipe(
        **({"epochs": 4, "lr": 3e-3, "optimizer": "adam", "batch_size": 64, "precision": "fp32"} | changes)
    )
    task = Task(**SHAPE, threat=LINF, network=nn.Identity, player=recipe.player, victim=trained_network())
    data = DeviceData(Images(pixels, bunch.target[:images]))
    trained = train(spec, task, data, None, recipe, seed=0, device="cpu")
    return weights_of(trained.modules), trained.curves


def fresh(spec: LearnedAttack, seed: int = 0, shape: Any = SHAPE) -> dict[str, Tensor]:
    """Weights before any fit."""
    torch.manual_seed(seed)
    return weights_of(spec.build(**shape))


def strike(
    attack: NeedsWeights, spec: LearnedAttack, weights: dict[str, Tensor], system: System | None = None,
    threat: ThreatModel = LINF, rows: slice = slice(1500, None), seed: int = 0, view: str = "adaptive",
) -> AttackResult:  # fmt: skip
    """The fitted attack on digits that it was not fitted to."""
    x, y = digits()
    victim = system or TorchSystem(trained_network(), **SHAPE)
    return attack.with_weights(spec, weights, **SHAPE)(victim, x[rows], untargeted(y[rows]), threat, seed, view=view)


def context(spec: LearnedAttack, victim: nn.Module | None = None, seed: int = 0) -> Context:
    """A step's context with freshly built modules, in train mode."""
    torch.manual_seed(seed)
    modules = {name: module.train() for name, module in spec.build(**SHAPE).items()}
    context = Context(modules=modules, threat=LINF, victim=victim or trained_network())
    context.rng.manual_seed(seed)
    return context
