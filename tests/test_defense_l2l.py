"""L2L: who is in which mode when, what the attacker sees, Naive, Grad, 2-Step and k-step forms, every option."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversary_toys import conv_means, learns, look_at, running_mean, square_batch, square_network
from stepping import LINF, Bench, Probe, moved, parameters, same, state, tracked
from torch import Tensor, nn

from casemate.defenses.l2l import L2L
from casemate.errors import UserError
from casemate.networks.base import count_parameters
from casemate.threat import ThreatModel


def small(**options: Any) -> L2L:
    return L2L(**{"width": 4, "generator_lr": 0.01, **options})


@pytest.mark.parametrize(
    ("options", "forwards", "backwards", "attacker"),
    [
        ({"see_gradient": False}, 2, 2, 2),  # Naive L2L
        ({}, 4, 4, 2),  # Grad L2L: 4 F, 3 Bx, 1 Bw
        ({"steps": 2}, 6, 6, 4),  # 2-Step L2L: 6 F, 5 Bx, 1 Bw
        ({"steps": 4, "step_factor": 0.226}, 10, 10, 8),
    ],
)
def test_passes(options: dict[str, Any], forwards: int, backwards: int, attacker: int) -> None:
    looked = look_at(small(**options))
    assert looked.images == (forwards - 1, 1) and len(looked.f.inputs) == forwards
    assert looked.f.backwards == backwards
    assert len(looked.g.inputs) == attacker
    assert looked.g.backwards == attacker // 2, "it learns through all its calls"
    assert [players for players, _ in looked.updates] == [("classifier",), ("generator",)]


def test_modes_and_running_statistics() -> None:
    """Its own step: f train, the query included, attacker eval; then f eval, attacker train."""
    looked = look_at(small(steps=2))
    assert looked.f.train == [True] * 3 + [False] * 3
    assert looked.f.frozen == [True] * 2 + [False] + [True] * 3
    assert looked.g.train == [False] * 2 + [True] * 2
    assert tracked(looked.bench.f) == 3 and tracked(looked.bench.modules["generator"]) == 2


@pytest.mark.parametrize(
    ("mode", "train", "seen"), [("eval", False, 1), ("train", True, 1), ("train_update", True, 2)]
)
def test_the_query_is_in_the_mode_asked_for(mode: Any, train: bool, seen: int) -> None:
    looked = look_at(small(bn_mode_attack=mode))
    assert looked.f.train == [train, True, False, False]
    assert tracked(looked.bench.f) == seen
    x_adv = looked.f.inputs[1]
    if mode != "train_update":
        torch.testing.assert_close(running_mean(looked.bench), conv_means(looked.before["classifier"], x_adv))


def test_each_update_moves_its_player_only_and_the_attacker_meets_the_new_classifier() -> None:
    bench, (x, y) = Bench(small(), square_network), square_batch()
    attacker = bench.modules["generator"]
    before_f, before_g = parameters(bench.f), state(attacker)
    with Probe(attacker) as seen:
        stepping = bench.updates(x, y)
        assert next(stepping)[0] == ("classifier",)
        assert moved(before_f, bench.f) and same(before_g, state(attacker))
        new, before_g = copy.deepcopy(bench.f).eval(), parameters(attacker)
        between = state(bench.f)
        assert next(stepping)[0] == ("generator",)
        assert same(between, state(bench.f)) and moved(before_g, attacker)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(new(at), y, reduction="sum"), at)
    torch.testing.assert_close(seen.inputs[1][:, 1:], gradient / gradient.abs().max())


@pytest.mark.parametrize("over", ["batch", "image"])
def test_the_attacker_sees_the_image_and_its_scaled_gradient(over: Any) -> None:
    looked = look_at(small(gradient_over=over, bn_mode_attack="eval"))
    at = looked.x.clone().requires_grad_()
    f = copy.deepcopy(looked.before["classifier"]).eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(f(at), looked.y, reduction="sum"), at)
    top = gradient.abs().max() if over == "batch" else gradient.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(looked.g.inputs[0], torch.cat([looked.x, gradient / top], 1))


def test_without_gradients_there_is_no_query_and_only_the_image() -> None:
    looked = look_at(small(see_gradient=False))
    assert torch.equal(looked.g.inputs[0], looked.x) and torch.equal(looked.g.inputs[1], looked.x)
    assert looked.f.train == [True, False] and tracked(looked.bench.f) == 1
    crafted = [look_at(small(see_gradient=False), roll=roll).f.inputs[0] for roll in (0, 1)]
    assert torch.equal(*crafted), "labels do not reach it"


def test_two_steps_are_the_clipped_sum_of_two_calls() -> None:
    looked = look_at(small(steps=2, bn_mode_attack="eval"))
    f, g = (copy.deepcopy(looked.before[name]).eval() for name in ("classifier", "generator"))

    def call(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(f(at), looked.y, reduction="sum"), at)
        moves: Tensor = 0.1 * g(torch.cat([at.detach(), gradient / gradient.abs().max()], 1)).detach()
        return moves

    first = call(looked.x)
    at_first = (looked.x + first).clamp(0, 1)
    x_adv = (looked.x + (first + call(at_first)).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(looked.f.inputs[1], at_first)
    torch.testing.assert_close(looked.f.inputs[2], x_adv)
    assert bool(LINF.contains(x_adv, looked.x).all())


def test_the_losses_by_hand() -> None:
    bench, (x, y) = Bench(small(), square_network), square_batch()
    with Probe(bench.f) as f:
        stepping = bench.updates(x, y)
        before = copy.deepcopy(bench.f).train()
        _, loss = next(stepping)
        new = copy.deepcopy(bench.f).eval()
        _, attackers = next(stepping)
    assert loss == pytest.approx(F.cross_entropy(before(f.inputs[1]), y).item(), rel=1e-5)
    logits = new(f.inputs[3])
    assert attackers == pytest.approx(-F.cross_entropy(logits, y).item(), rel=1e-5)
    assert float(bench.ctx.logs["fooled"]) == pytest.approx(float((logits.argmax(1) != y).float().mean()))


def test_the_attackers_gradient_is_that_of_minus_the_ce() -> None:
    bench, (x, y) = Bench(small(steps=2), square_network), square_batch()
    stepping = bench.updates(x, y)
    next(stepping)
    f, g = copy.deepcopy(bench.f).eval(), copy.deepcopy(bench.modules["generator"]).train()
    next(stepping)

    def seen(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(f(leaf), y, reduction="sum"), leaf)
        return torch.cat([at, gradient / gradient.abs().max()], 1)

    first = 0.1 * g(seen(x))
    delta = (first + 0.1 * g(seen((x + first).clamp(0, 1)))).clamp(-0.1, 0.1)
    loss = -F.cross_entropy(f((x + delta).clamp(0, 1)), y)
    own = torch.autograd.grad(loss, list(g.parameters()))
    for parameter, gradient in zip(bench.modules["generator"].parameters(), own, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("see", [True, False])
def test_the_attacker_learns_to_raise_the_loss(see: bool) -> None:
    bench, (x, y) = Bench(small(see_gradient=see), square_network, lr=0.0), square_batch()
    values = [-bench.step(x, y)[1][1] for _ in range(40)]
    assert sum(values[-5:]) > sum(values[:5]) + 0.02


def test_players_and_published_sizes() -> None:
    bench = Bench(small(generator_lr=0.003, generator_weight_decay=0.1))
    optimizer = bench.players["generator"].optimizer
    assert isinstance(optimizer, torch.optim.Adam) and bench.players["generator"].schedule is None
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.003, 0.1)
    assert list(bench.players) == ["classifier", "generator"]
    with torch.device("meta"):
        wide, slim = (L2L(network=n, width=w).build((3, 32, 32), 10) for n, w in (("wide", 64), ("slim", 128)))  # type: ignore[arg-type]
    assert count_parameters(wide["generator"]) == 1_747_851 and count_parameters(slim["generator"]) == 1_434_359
    assert L2L() == L2L(network="wide", width=64, steps=1, generator_lr=1e-3, generator_weight_decay=2e-4)


@pytest.mark.parametrize("see", [True, False])
def test_the_slim_attacker(see: bool) -> None:
    looked = look_at(small(network="slim", width=8, see_gradient=see))
    assert type(looked.bench.modules["generator"]).__name__ == "SlimAttacker"
    assert moved(dict(looked.before["generator"].named_parameters()), looked.bench.modules["generator"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="slim attacker takes images whose height and width are multiples of 2"):
        small(network="slim", see_gradient=see).build((1, 7, 7), 4)


def test_no_gradient_anywhere_is_no_nan() -> None:
    bench, (x, y) = Bench(small(), square_network), square_batch()
    nn.init.zeros_(bench.f.head.weight)
    assert all(math.isfinite(loss) for _, loss in bench.step(x, y))


def test_the_radius_grows() -> None:
    looked = look_at(small(ramp=0.5), fraction=0.25)
    assert float((looked.f.inputs[1] - looked.x).abs().max()) <= 0.05 + 1e-6
    assert float((look_at(small()).f.inputs[1] - looked.x).abs().max()) > 0.05


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="takes one step: set steps to 1"):
        L2L(see_gradient=False, steps=2)
    with pytest.raises(UserError, match="defense L2L works in linf, not in l2"):
        Bench(small(), threat=ThreatModel("l2", 0.5))


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"see_gradient": False}])
def test_it_learns_one_batch(options: dict[str, Any]) -> None:
    first, last, accuracy = learns(small(generator_lr=0.001, **options))
    assert last < first / 3 and accuracy == 1
