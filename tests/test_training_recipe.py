"""Recipes: schedules at points computed by hand, budgets, players, bad values."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from casemate.training.recipe import Recipe


def factors(points: list[float], **changes: object) -> list[float]:
    made = Recipe(**{"epochs": 1, "lr": 1, **changes})
    return [round(made.factor(t), 12) for t in points]


def test_constant_after_a_linear_warmup() -> None:
    assert factors([0, 0.1, 0.2, 0.9, 1], warmup=0.2) == [0, 0.5, 1, 1, 1]


def test_piecewise_drops_at_each_milestone() -> None:
    assert factors([0, 0.49, 0.5, 0.74, 0.75, 1], schedule="piecewise") == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert factors([0.05, 0.6], schedule="piecewise", warmup=0.1, milestones=("1/2",), gamma=0.5) == [0.5, 0.5]


def test_trapezoid_rises_holds_and_falls_to_zero() -> None:
    points = [0, 0.05, 0.1, 0.5, 0.75, 1]
    assert factors(points, schedule="trapezoid", warmup=0.1, hold=0.5) == [0, 0.5, 1, 1, 0.5, 0]
    assert factors([0.5, 1], schedule="trapezoid", hold=1) == [1, 1]


def test_cyclic_peaks_at_the_warmup() -> None:
    assert factors([0, 0.2, 0.4, 0.7, 1], schedule="cyclic", warmup=0.4) == [0, 0.5, 1, 0.5, 0]


def test_cosine_is_half_a_period_after_the_warmup() -> None:
    assert factors([0, 0.1, 0.2, 0.6, 1], schedule="cosine", warmup=0.2) == [0, 0.5, 1, 0.5, 0]
    assert factors([0.25], schedule="cosine") == [round((1 + 2**-0.5) / 2, 12)]


def test_a_budget_scales_the_epochs_and_nothing_else() -> None:
    made = Recipe(epochs=13, lr=0.1, schedule="trapezoid", warmup=0.1)
    half = made.scaled(0.25)
    assert half.epochs == 3.25
    assert {**half.as_dict(), "epochs": 13} == made.as_dict()
    assert made.scaled(1) is made


def test_batches_of_an_epoch() -> None:
    assert Recipe(epochs=1, lr=1, batch_size=32).batches(100) == 4
    assert Recipe(epochs=1, lr=1, batch_size=32, drop_last=True).batches(100) == 3


def test_player_has_the_recipes_settings_and_its_own_changes() -> None:
    made = Recipe(epochs=1, lr=0.2, momentum=0.8, nesterov=True, weight_decay="1/1000", max_grad_norm=3, warmup=0.5)
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    player = made.player(layer.parameters(), lr_scale=0.5)
    group = player.optimizer.param_groups[0]
    assert [p is layer.weight for p in player.parameters] == [True]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.8, True, 0.001)
    assert (player.max_grad_norm, player.schedule and player.schedule(0.25), player.precision) == (3, 0.5, "auto")

    other = made.player(
        layer.parameters(), optimizer="adam", lr=2e-4, betas=(0.5, 0.999), schedule="constant", warmup=0
    )
    assert isinstance(other.optimizer, torch.optim.Adam)
    assert (other.optimizer.param_groups[0]["lr"], other.optimizer.param_groups[0]["betas"]) == (2e-4, (0.5, 0.999))
    assert other.schedule is not None and other.schedule(0.1) == 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_kernels_alone_decay_where_the_recipe_says_so(optimizer: str) -> None:
    """With a gradient of zero, what decays moves and what does not stays."""
    for decay, moved in (("all", [True] * 6), ("kernels", [True, False, False, False, True, False])):
        made = Recipe(**{"epochs": 1, "lr": 0.1, "optimizer": optimizer, "weight_decay": 0.1, "decay": decay})
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
        net[1].bias.data.fill_(1.0)
        before = [p.detach().clone() for p in net.parameters()]
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        made.player(net.parameters()).optimizer.step()
        after = list(net.parameters())
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == moved


def test_a_player_of_vectors_alone_has_no_empty_group() -> None:
    made = Recipe(epochs=1, lr=0.1, weight_decay=0.1, decay="kernels")
    (group,) = made.player([nn.Parameter(torch.ones(3))]).optimizer.param_groups
    assert group["weight_decay"] == 0 and len(group["params"]) == 1
    (group,) = made.player([nn.Parameter(torch.ones(3, 3))]).optimizer.param_groups
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"epoch": 1}, "epoch"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1}, "lr"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"schedule": "step"}, "schedule"),
        ({"momentum": 0, "nesterov": True}, "nesterov needs a momentum"),
        ({"ema": 1}, "ema must be below 1"),
        ({"ema_warmup": 1.5}, "ema_warmup"),
        ({"ema_statistics": "own"}, "ema_statistics"),
        ({"decay": "weights"}, "decay"),
        ({"awp": -0.01}, "awp"),
        ({"awp_warmup": 1.5}, "awp_warmup"),
        ({"awp_statistics": "none"}, "awp_statistics"),
        ({"schedule": "trapezoid", "warmup": 0.6}, "must not come before"),
        ({"milestones": [0.9, 0.5]}, "increasing"),
        ({"select": "worst"}, "select"),
    ],
)
def test_a_bad_value_is_named(bad: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Recipe(**{"epochs": 1, "lr": 1, **bad})


def test_a_recipe_needs_no_torch() -> None:
    code = "import sys; import casemate.training.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
