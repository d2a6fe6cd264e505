"""LAT: the latent adversary and its ranges, who moves in which half-step, statistics, the two ways to weigh them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, moved, parameters, same, state
from torch import Tensor, nn
from training_toys import recipe, run, weights
from training_toys import same as equal

from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.lat import LAT, extent, usual_layer
from casemate.errors import UserError
from casemate.networks.base import Classifier, build_network
from casemate.networks.blocks import GlobalMean
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.trainable import Task


def staged(size: int = 6, num_classes: int = 4) -> Classifier:
    """Three convolutions with batch norm on 1 x size x size images."""
    torch.manual_seed(0)

    def conv(into: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    layers = {"stem": conv(1, 4), "stage1": conv(4, 5), "stage2": conv(5, 6), "pool": GlobalMean()}
    return Classifier(
        input_shape=(1, size, size), num_classes=num_classes, layers=layers, head=nn.Linear(6, num_classes)
    )


def bench(threat: ThreatModel = LINF, **options: Any) -> Bench:
    given = {"steps": 3, "latent_steps": 4, "adversarial_first": 0.0, **options}
    return Bench(LAT(**given), staged, threat)


def halves(f: Classifier, layer: str = "stage1") -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(f).train().split(layer)


# --- the codes ----------------------------------------------------------------------------------------------


def test_the_range_is_each_channels_or_that_of_all() -> None:
    z = torch.tensor([[[[0.0, 2.0]], [[-5.0, 1.0]]], [[[7.0, 1.0]], [[0.0, 0.0]]]])
    low, high = extent(z, per_channel=True)
    assert low.flatten().tolist() == [0, -5] and high.flatten().tolist() == [7, 1]
    low, high = extent(z, per_channel=False)
    assert low.flatten().tolist() == [-5] and high.flatten().tolist() == [7]
    low, high = extent(torch.tensor([[0.0, 3.0], [2.0, -1.0]]), per_channel=True)
    assert low.tolist() == [[0, -1]] and high.tolist() == [[2, 3]]


def codes(made: Bench, x: Tensor, y: Tensor) -> Tensor:
    made.f.train()
    made.ctx.rng = generator("step", 0)
    return made.defense.latent_codes(made.ctx, x, y)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["channel", "global"])
def test_codes_stay_in_the_radius_and_in_the_range(kind: Any) -> None:
    made, (x, y) = bench(latent_range=kind, latent_radius=0.1), batch()
    found = codes(made, x, y)
    h, _ = halves(made.f)
    z = h(x).detach()
    axes = (0, 2, 3) if kind == "channel" else (0, 1, 2, 3)
    spread = z.amax(axes, keepdim=True) - z.amin(axes, keepdim=True)
    share = ((found - z).abs() / spread).flatten()
    assert float(share.max()) == pytest.approx(0.1, abs=1e-5)
    assert bool((found >= z.amin(axes, keepdim=True)).all()) and bool((found <= z.amax(axes, keepdim=True)).all())
    assert not found.requires_grad


def test_the_latent_step_by_hand() -> None:
    """One step from a start that is not cut: sign(grad CE(g(z'))), each with the statistics of the batch."""
    made, (x, y) = bench(latent_steps=1, latent_step=0.3, latent_radius=0.1), batch()
    h, g = halves(made.f)
    z = h(x).detach()
    low, high = z.amin((0, 2, 3), keepdim=True), z.amax((0, 2, 3), keepdim=True)
    r = 0.1 * (high - low)
    start = (z + r * (2 * torch.rand(z.shape, generator=generator("step", 0)) - 1)).requires_grad_()
    assert bool((start < low).any())
    (gradient,) = torch.autograd.grad(F.cross_entropy(g(start), y), start)
    expected = torch.minimum(torch.maximum(start + 0.3 * r * gradient.sign(), z - r), z + r)
    expected = torch.minimum(torch.maximum(expected, low), high)
    torch.testing.assert_close(codes(made, x, y), expected)


def test_the_ascent_raises_the_loss_and_noise_does_not_look() -> None:
    x, y = batch()
    found = {}
    for kind in ("ascent", "noise"):
        made = bench(latent_adversary=kind, latent_radius=0.2, latent_steps=20)
        h, g = halves(made.f)
        found[kind] = F.cross_entropy(g(codes(made, x, y)), y).item() - F.cross_entropy(g(h(x)), y).item()
    assert found["ascent"] > 0.1 > abs(found["noise"])
    made = bench(latent_adversary="noise", latent_radius=0.2)
    assert torch.equal(codes(made, x, y), codes(made, x, y.roll(1))), "label-free"
    z = halves(made.f)[0](x).detach()
    low, high = z.amin((0, 2, 3), keepdim=True), z.amax((0, 2, 3), keepdim=True)
    noise = torch.randn(z.shape, generator=generator("step", 0))
    expected = torch.minimum(torch.maximum(z + 0.2 * (high - low) * noise, low), high)
    torch.testing.assert_close(codes(made, x, y), expected)


@pytest.mark.parametrize(
    ("name", "options", "shape", "layer"),
    [("wrn", {"depth": 10, "width": 1}, (3, 32, 32), "stage2"), ("preact_resnet18", {}, (3, 32, 32), "stage3"),
     ("small_cnn", {}, (1, 28, 28), "conv3"), ("lenet5", {}, (1, 28, 28), "conv2"),
     ("digits_cnn", {}, (1, 8, 8), "conv1")],
)  # fmt: skip
def test_the_usual_layer(name: str, options: Any, shape: Any, layer: str) -> None:
    f = build_network(name, input_shape=shape, num_classes=10, **options)
    assert usual_layer(f.layers) == layer


def test_the_usual_layer_of_other_networks_is_the_first() -> None:
    assert usual_layer(["fc1", "fc2"]) == "fc1" and usual_layer(["conv", "pool"]) == "conv"


# --- the steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_passes_of_a_step(joint: bool) -> None:
    made, (x, y) = bench(joint=joint), batch()
    with Probe(made.f.body["stem"]) as lower, Probe(made.f.body["stage2"]) as upper:
        made.step(x, y)
    # below the layer: the clean codes once; above it: four of ascent and the loss. Both: three of ascent and the loss
    assert len(lower.inputs) == 1 + 3 + 1 and len(upper.inputs) == 4 + 1 + 3 + 1
    assert (lower.backwards, upper.backwards) == (3 + 1, 4 + 1 + 3 + 1)
    assert lower.train == [True] * 5 and upper.train == [True] * 9
    assert torch.equal(lower.inputs[0], x)
    latent = [True] * 4 + [False]
    images = [True] * 3 + [False]
    assert upper.frozen == (latent[:4] + images[:3] + [False] * 2 if joint else latent + images)


def test_the_latent_step_moves_what_lies_above_and_no_statistic() -> None:
    made, (x, y) = bench(), batch()
    lower, upper = made.f.split("stage1")
    before_lower, before_upper = state(lower), parameters(upper)
    buffers = {key: value.clone() for key, value in made.f.named_buffers()}
    stepping = made.updates(x, y)
    players, _ = next(stepping)
    assert players == ("latent",)
    assert same(before_lower, state(lower)) and all(p.grad is None for p in lower.parameters())
    assert moved(before_upper, upper)
    assert same(buffers, dict(made.f.named_buffers()))
    before = parameters(made.f)
    players, _ = next(stepping)
    assert players == ("classifier",) and moved(before, made.f)


@pytest.mark.parametrize(("mode", "seen"), [("train_update", 4), ("train", 1), ("eval", 1)])
def test_running_statistics_are_those_of_the_adversarial_images(mode: Any, seen: int) -> None:
    made, (x, y) = bench(bn_mode_attack=mode), batch()
    with Probe(made.f.body["stem"]) as passes:
        made.step(x, y)
    norms = [m for m in made.f.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [int(m.num_batches_tracked or 0) for m in norms] == [seen] * 3
    assert passes.train == [True] + [mode != "eval"] * 3 + [True]


def test_the_images_are_crafted_on_the_weights_that_the_latent_step_left() -> None:
    made, (x, y) = bench(bn_mode_attack="train", steps=1), batch()
    stepping = made.updates(x, y)
    next(stepping)
    f = copy.deepcopy(made.f).train()
    with Probe(made.f) as passes:
        ((_, loss),) = list(stepping)
    start = passes.inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(f(start), y), start)
    expected = start.detach() + 0.25 * gradient.sign()
    expected = torch.minimum(torch.maximum(expected, x - LINF.radius), x + LINF.radius).clamp(0, 1)
    torch.testing.assert_close(passes.inputs[1], expected)
    assert loss == pytest.approx(F.cross_entropy(f(expected), y).item(), rel=1e-5)


def test_the_latent_loss_by_hand() -> None:
    made, (x, y) = bench(), batch()
    _, g = halves(made.f)
    found = codes(copy.deepcopy(made), x, y)
    (_, loss), _ = made.step(x, y)
    assert loss == pytest.approx(F.cross_entropy(g(found), y).item(), rel=1e-6)


@pytest.mark.parametrize("omega", [0.2, 0.5])
def test_the_joint_loss_is_the_weighted_sum(omega: float) -> None:
    made, (x, y) = bench(joint=True, omega=omega), batch()
    f = copy.deepcopy(made.f).train()
    found = codes(copy.deepcopy(made), x, y)
    with Probe(made.f) as passes:
        ((players, loss),) = made.step(x, y)
    of_codes, of_images = F.cross_entropy(f.split("stage1")[1](found), y), F.cross_entropy(f(passes.inputs[-1]), y)
    assert players == ("classifier",) and list(made.players) == ["classifier"]
    assert loss == pytest.approx((omega * of_codes + (1 - omega) * of_images).item(), rel=1e-5)
    assert float(made.ctx.logs["latent"]) == pytest.approx(of_codes.item(), rel=1e-5)


def test_alternating_omega_is_a_ratio_of_learning_rates_without_decay() -> None:
    made = recipe(lr=0.1, momentum=0.9, weight_decay=0.01)
    task = Task((1, 6, 6), 4, LINF, staged, made.player)
    defense = LAT(omega=0.2)
    players = defense.players(task, defense.modules(task))
    (whole,), (latent,) = (players[name].optimizer.param_groups for name in ("classifier", "latent"))
    assert (whole["lr"], latent["lr"]) == pytest.approx((0.1, 0.025))
    assert (whole["weight_decay"], latent["weight_decay"], latent["momentum"]) == (0.01, 0, 0.9)
    assert len(latent["params"]) == 5 and len(whole["params"]) == 11
    assert all(any(p is q for q in whole["params"]) for p in latent["params"]), "one network"


def test_each_half_step_has_a_momentum_of_its_own() -> None:
    made = recipe(epochs=0.5, momentum=0.9)
    trained = run(LAT(steps=1, latent_steps=1, adversarial_first=0.0), made, network=lambda: staged(4, 3))
    other = run(LAT(steps=1, latent_steps=1, adversarial_first=0.0), recipe(epochs=0.5), network=lambda: staged(4, 3))
    assert not equal(weights(trained), weights(other))
    bench_ = Bench(LAT(steps=1, latent_steps=1, adversarial_first=0.0), staged)
    for player in bench_.players.values():
        player.optimizer.param_groups[0]["momentum"] = 0.9
    bench_.step(*batch())
    head = bench_.f.head.weight
    buffers = [player.optimizer.state[head]["momentum_buffer"] for player in bench_.players.values()]
    assert not torch.allclose(*buffers)


def test_it_begins_as_adversarial_training() -> None:
    x, y = batch()
    made = bench(adversarial_first=0.5)
    plain = Bench(ATPGD(steps=3, bn_mode_attack="train_update"), staged)
    assert made.step(x, y, 0.49) == plain.step(x, y, 0.49)
    assert same(state(made.f), state(plain.f))
    assert [players for players, _ in made.step(x, y, 0.5)] == [("latent",), ("classifier",)]


def test_another_layer_may_be_moved() -> None:
    made, (x, y) = bench(layer="stem"), batch()
    with Probe(made.f.body["stage1"]) as upper:
        made.step(x, y)
    assert len(upper.inputs) == 9
    with pytest.raises(UserError, match="no layer 'stage9'; layers: stem, stage1, stage2, pool"):
        bench(layer="stage9")


def test_no_weight_for_images_is_refused() -> None:
    with pytest.raises(UserError, match="omega must be below 1"):
        bench(omega=1.0)


@pytest.mark.parametrize("joint", [False, True])
def test_it_learns_one_batch(joint: bool) -> None:
    defense = LAT(steps=2, latent_steps=3, adversarial_first=0.3, joint=joint)
    made = Bench(defense, staged, ThreatModel("linf", 0.03), lr=0.01, optimizer=torch.optim.Adam)
    x, y = batch()
    losses = [made.step(x, y, i / 120)[-1][1] for i in range(120)]
    assert losses[-1] < losses[0] / 3
    assert bool((made.f.train()(x).argmax(1) == y).all())


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    class Died(Exception):
        pass

    def die(_: object) -> None:
        raise Died

    def network() -> Classifier:
        return staged(4, 3)

    # three epochs, the latent adversary from the second on: the checkpoint after that one has both momenta
    method = LAT(steps=1, latent_steps=2, adversarial_first=0.3)
    made = recipe(epochs=3, momentum=0.9, lr=0.02)
    straight = run(method, made, network=network)
    with pytest.raises(Died):
        run(method, made, network=network, checkpoints=tmp_path, save=die)
    slots = sorted(tmp_path.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    slots[-1].unlink()
    resumed = run(method, made, network=network, checkpoints=tmp_path)
    assert equal(weights(resumed), weights(straight))
    assert {"loss", "loss_latent"} <= set(straight.curves[-1]) and "loss_latent" not in straight.curves[0]
