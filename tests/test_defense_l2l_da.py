"""L2L-DA: the recursion's loss by hand, every ablation switch, both turns, passes, statistics, the clean warm-up."""

from __future__ import annotations

import copy
import math
from typing import Any

import embedding_toys
import pytest
import torch
import torch.nn.functional as F
from adversary_toys import Looked, conv_means, learns, look_at, running_mean, square_batch, square_network
from stepping import LINF, Bench, Probe, linear_network, moved, parameters, same, state, tracked
from torch import Tensor, nn

from casemate.defenses.l2l_da import L2LDA
from casemate.errors import UserError
from casemate.networks.base import count_parameters
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.training.recipe import Recipe


def small(**options: Any) -> L2LDA:
    return L2LDA(**{"width": 4, "steps": 3, "z_dim": 2, **options})


def by_hand(
    looked: Looked, defense: L2LDA, radius: float = 0.1
) -> tuple[Tensor, list[Tensor], list[Tensor], nn.Module]:
    """(z, x_adv of every step, CE of every step, a copy of the generator that they are differentiable in)."""
    f, g = copy.deepcopy(looked.before["classifier"]).eval(), copy.deepcopy(looked.before["generator"]).train()
    x, y = torch.cat([looked.x, looked.x]), torch.cat([looked.y, looked.y])
    z = torch.randn(len(x), defense.z_dim, generator=generator("step", 0))
    delta, images, losses = torch.zeros_like(x), [], []
    for _ in range(defense.steps):
        leaf = (x + delta).clamp(0, 1).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(f(leaf), y, reduction="sum"), leaf)
        gradient = gradient / gradient.flatten(2).norm(dim=2)[:, :, None, None]
        seen = [x, gradient, delta] if defense.feed_delta else [x, gradient]
        u = g(torch.cat(seen, 1), y, z)
        delta = (delta + defense.step_factor * radius * u).clamp(-radius, radius)
        images.append((x + delta).clamp(0, 1))
        losses.append(F.cross_entropy(f(images[-1]), y))
    return z, images, losses, g


def ratio(x_adv: Tensor, z: Tensor, how: str = "mean") -> Tensor:
    a, b = x_adv.chunk(2), z.chunk(2)
    if how == "mean":
        return ((a[0] - a[1]).abs().mean((1, 2, 3)) / (b[0] - b[1]).abs().mean(1)).mean()
    return ((a[0] - a[1]).abs().sum((1, 2, 3)) / (b[0] - b[1]).abs().sum(1)).mean()


# --- passes and modes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_passes(steps: int) -> None:
    """1 + 2 T forward passes (the table's 1 + 2 T + 2 (T - 1), reusing those at x_adv), and 3 that teach f."""
    looked = look_at(small(steps=steps))
    assert looked.images == (1 + 2 * steps, 3)
    assert [len(seen) for seen in looked.f.inputs] == [8] + [16] * steps + [24]
    assert looked.f.backwards == 1 + steps + 1
    assert [len(seen) for seen in looked.g.inputs] == [16] * steps and looked.g.backwards == steps
    assert looked.f.train == [False] * (1 + steps) + [True] and looked.g.train == [True] * steps
    assert [players for players, _ in looked.updates] == [("generator",), ("classifier",)]


def test_running_statistics_see_clean_and_both_adversarial_images_at_once() -> None:
    looked = look_at(small())
    assert tracked(looked.bench.f) == 1 and tracked(looked.bench.modules["generator"]) == 3
    seen = looked.f.inputs[-1]
    assert torch.equal(seen[:8], looked.x)
    torch.testing.assert_close(running_mean(looked.bench), conv_means(looked.before["classifier"], seen))


def test_each_update_moves_its_player_only() -> None:
    bench, (x, y) = Bench(small(), square_network), square_batch()
    g = bench.modules["generator"]
    f_before, g_before = state(bench.f), parameters(g)
    stepping = bench.updates(x, y)
    next(stepping)
    assert same(f_before, state(bench.f)) and any(not torch.equal(v, g_before[k]) for k, v in g.named_parameters())
    f_before, g_before = parameters(bench.f), state(g)
    next(stepping)
    assert moved(f_before, bench.f) and same(g_before, state(g))


def test_the_images_that_f_learns_are_those_before_the_generators_step() -> None:
    defense = small()
    looked = look_at(defense)
    _, images, _, _ = by_hand(looked, defense)
    torch.testing.assert_close(looked.f.inputs[-1][8:], images[-1], rtol=0, atol=1e-6)
    for seen in looked.f.inputs[1:]:
        assert bool(LINF.contains(seen[-16:], torch.cat([looked.x, looked.x])).all())


# --- the generator's loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"over_steps": "mean"},
        {"loss_at": "last"},
        {"diversity_at": "last"},
        {"loss_at": "last", "diversity_at": "last"},
        {"diversity": 0.0},
        {"diversity_norm": "sum", "diversity": 0.001},
        {"feed_delta": False},
        {"condition": False},
        {"steps": 1, "step_factor": 1.0},
        {"deeper": True},
    ],
    ids=str,
)
def test_the_generators_loss_and_gradient_by_hand(options: dict[str, Any]) -> None:
    defense = small(**{"diversity": 0.3, **options})
    looked = look_at(defense)
    z, images, losses, g = by_hand(looked, defense)
    ces = losses if defense.loss_at == "every" else losses[-1:]
    apart = [ratio(x_adv, z, defense.diversity_norm) for x_adv in images]
    ratios = apart if defense.diversity_at == "every" else apart[-1:]
    total = -torch.stack(ces).sum() - defense.diversity * torch.stack(ratios).sum()
    if defense.over_steps == "mean":
        total = total / defense.steps
    assert looked.updates[0][1] == pytest.approx(total.item(), rel=1e-4)
    assert float(looked.bench.ctx.logs["apart"]) == pytest.approx(apart[-1].item(), rel=1e-3)
    mine = looked.bench.modules["generator"].parameters()
    own = torch.autograd.grad(total, list(g.parameters()), allow_unused=True)
    for parameter, gradient in zip(mine, own, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=5e-3, atol=2e-5)
    assert max(float(gradient.abs().max()) for gradient in own if gradient is not None) > 1e-3


def test_the_switches_reach_the_network() -> None:
    def channels(**options: Any) -> int:
        return look_at(small(**options)).g.inputs[0].shape[1]

    assert (channels(), channels(feed_delta=False)) == (3, 2)
    names = {name: {k for k, _ in look_at(small(condition=c)).bench.modules["generator"].named_parameters()}
             for name, c in (("with", True), ("without", False))}  # fmt: skip
    assert any("class_scale" in k for k in names["with"]) and not any("class" in k for k in names["without"])
    crafted = [look_at(small(condition=False), roll=roll).f.inputs[0] for roll in (0, 1)]
    assert torch.equal(*crafted)


@pytest.mark.parametrize("norm", ["rms", "channel", "image", "none"])
def test_gradients_are_normalised_as_asked(norm: Any) -> None:
    looked = look_at(small(gradient_norm=norm))
    at = looked.x.clone().requires_grad_()
    f = copy.deepcopy(looked.before["classifier"]).eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(f(at), looked.y, reduction="sum"), at)
    length = gradient.flatten(1).norm(dim=1)[:, None, None, None]
    expected = {"rms": gradient / length * 8, "none": gradient / 100}.get(norm, gradient / length)
    torch.testing.assert_close(looked.g.inputs[0][:, 1:2], torch.cat([expected, expected]), rtol=1e-4, atol=1e-6)


def test_noise_makes_the_two_images_differ_and_none_makes_one_that_counts_twice() -> None:
    one, two = look_at(small()).f.inputs[-1][8:].chunk(2)
    assert not torch.equal(one, two)
    looked = look_at(small(z_dim=0))
    one, two = looked.f.inputs[-1][8:].chunk(2)
    assert torch.equal(one, two)
    assert looked.images == (1 + 3, 3) and "apart" not in looked.bench.ctx.logs
    silent = look_at(small(diversity=0.0)).f.inputs[-1][8:].chunk(2)
    assert not torch.equal(*silent), "z is still an input"


# --- the classifier's turn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["joint", "sum", "successive"])
def test_the_classifiers_loss_by_hand(style: Any) -> None:
    weight = torch.randn(4, 64, generator=generator("w")).tolist()

    def flat() -> Any:
        network = linear_network(weight)
        network.input_shape = (1, 8, 8)
        return network

    looked = look_at(small(f_update=style), network=flat)
    f, (x, y) = copy.deepcopy(looked.before["classifier"]), square_batch()
    if style == "successive":
        assert [players for players, _ in looked.updates] == [("generator",), ("classifier",), ("classifier",)]
        (x_adv, clean), (_, (_, first), (_, second)) = looked.f.inputs[-2:], looked.updates
        assert len(x_adv) == 16 and torch.equal(clean, x)
        robust = F.cross_entropy(f(x_adv), y.repeat(2))
        assert first == pytest.approx(robust.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(robust, [f.head.weight])  # type: ignore[union-attr,list-item]
        f.head.weight.data -= 0.05 * gradient  # type: ignore[union-attr,operator]
        assert second == pytest.approx(F.cross_entropy(f(x), y).item(), rel=1e-5)
        return
    losses = F.cross_entropy(f(looked.f.inputs[-1]), y.repeat(3), reduction="none")
    expected = losses.mean() if style == "joint" else losses[:8].mean() + losses[8:].mean()
    assert looked.updates[1][1] == pytest.approx(expected.item(), rel=1e-5)
    assert looked.images == (7, 3)


def test_successive_updates_keep_their_statistics_apart() -> None:
    looked = look_at(small(f_update="successive"))
    assert looked.images == (7, 3) and tracked(looked.bench.f) == 2
    assert [len(seen) for seen in looked.f.inputs[-2:]] == [16, 8]


def test_the_classifier_alone_learns_during_the_clean_warm_up() -> None:
    defense = small(clean_warmup=0.3)
    looked = look_at(defense, fraction=0.29)
    assert [players for players, _ in looked.updates] == [("classifier",)]
    clean = copy.deepcopy(looked.before["classifier"])
    assert looked.updates[0][1] == pytest.approx(F.cross_entropy(clean(looked.x), looked.y).item(), rel=1e-5)
    assert looked.images == (0, 1) and not looked.g.inputs
    assert len(look_at(defense, fraction=0.3).updates) == 2
    assert len(look_at(small()).updates) == 2


def test_fresh_convolutions() -> None:
    spread = Bench(small(init_std=0.5), lambda: square_network(channels=64)).f.body["conv"][0].weight  # type: ignore[index]
    assert spread.std().item() == pytest.approx(0.5, rel=0.1)
    assert same(state(Bench(small(), square_network).f), state(square_network()))


# --- the rest -------------------------------------------------------------------------------------------------


def test_players_and_published_sizes() -> None:
    options = {"generator_lr": 0.02, "generator_momentum": 0.5, "generator_weight_decay": 0.1, "max_grad_norm": 2.0}
    players = Bench(small(**options), square_network).players
    assert list(players) == ["classifier", "generator"]
    assert {name: player.max_grad_norm for name, player in players.items()} == {"classifier": 2, "generator": 2}
    group, optimizer = players["generator"].optimizer.param_groups[0], players["generator"].optimizer
    assert isinstance(optimizer, torch.optim.SGD) and players["generator"].schedule is None
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.5, 0.1)
    assert Bench(small(max_grad_norm=None), square_network).players["classifier"].max_grad_norm is None
    with torch.device("meta"):
        sizes = [
            count_parameters(L2LDA().build(shape, classes)["generator"])
            for shape, classes in (((1, 28, 28), 10), ((3, 32, 32), 10), ((3, 64, 64), 200))
        ]
    assert sizes == [495_184, 500_944, 573_904]


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = L2LDA()
    assert (chosen.steps, chosen.step_factor, chosen.z_dim, chosen.width) == (10, 0.25, 8, 64)
    assert (chosen.gradient_norm, chosen.over_steps, chosen.max_grad_norm) == ("channel", "sum", 1.0)
    assert (chosen.loss_at, chosen.diversity_at, chosen.diversity_norm) == ("every", "every", "mean")
    assert (chosen.diversity, chosen.generator_lr, chosen.generator_weight_decay) == (0.02, 0.01, 1e-5)
    assert (chosen.generator_momentum, chosen.f_update, chosen.bn_joint) == (0.9, "joint", "concat")


@pytest.mark.parametrize(("style", "rate"), [("successive", 0.003), ("joint", 0.03), ("sum", 0.03)])
def test_the_generators_rate_follows_the_classifiers_in_successive_updates(style: Any, rate: float) -> None:
    falling = Recipe(epochs=1, lr=0.2, schedule="piecewise", milestones=(0.5,), precision="fp32")
    defense = small(f_update=style, generator_lr=0.03)
    bench = embedding_toys.Bench(defense, recipe=falling, network=square_network)
    for fraction, shares in ((0.4, (0.2, 0.03)), (0.6, (0.02, rate))):
        bench.step(*square_batch(), fraction=fraction)
        rates = [bench.players[name].optimizer.param_groups[0]["lr"] for name in ("classifier", "generator")]
        assert [float(value) for value in rates] == pytest.approx(shares)


def test_no_gradient_anywhere_is_no_nan() -> None:
    bench, (x, y) = Bench(small(), square_network), square_batch()
    nn.init.zeros_(bench.f.head.weight)
    with Probe(bench.modules["generator"]) as seen:
        assert all(math.isfinite(loss) for _, loss in bench.step(x, y))
    assert not seen.inputs[0][:, 1].any()


def test_the_generator_learns_to_raise_the_loss() -> None:
    bench, (x, y) = Bench(small(generator_lr=0.05), square_network, lr=0.0), square_batch()
    values = [-bench.step(x, y)[0][1] for _ in range(40)]
    assert sum(values[-5:]) > sum(values[:5]) + 0.1


def test_the_radius_grows() -> None:
    looked = look_at(small(ramp=0.5), fraction=0.25)
    _, images, _, _ = by_hand(looked, small(), radius=0.05)
    torch.testing.assert_close(looked.f.inputs[-1][8:], images[-1], rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="defense L2LDA works in linf, not in l2"):
        Bench(small(), square_network, ThreatModel("l2", 0.5))
    with pytest.raises(UserError, match="multiples of 4"):
        Bench(small())


@pytest.mark.parametrize("style", ["joint", "sum", "successive"])
def test_it_learns_one_batch(style: Any) -> None:
    first, last, accuracy = learns(small(f_update=style))
    assert last < first / 3 and accuracy == 1
