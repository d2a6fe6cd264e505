"""PGD adversarial training: passes, batch-norm modes, schedule, hand-computed loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, same, tracked
from torch import nn

from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.crafting import crafting
from casemate.errors import UserError
from casemate.seeding import generator
from casemate.threat import ThreatModel


@pytest.mark.parametrize("steps", [1, 4])
def test_k_steps_cost_k_input_gradients_and_one_weight_gradient(steps: int) -> None:
    bench, (x, y) = Bench(ATPGD(steps=steps)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * steps + [False]
    assert passes.train == [False] * steps + [True]
    assert passes.backwards == steps + 1
    assert moved(before, bench.f)
    assert all(p.requires_grad for p in bench.f.parameters())


@pytest.mark.parametrize(("mode", "updates"), [("eval", 1), ("train", 1), ("train_update", 4)])
def test_running_statistics_see_what_the_mode_says(mode: Any, updates: int) -> None:
    bench, (x, y) = Bench(ATPGD(steps=3, bn_mode_attack=mode)), batch()
    conv, norm = bench.f.body["conv"][0], bench.f.body["conv"][1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    with torch.no_grad():
        kernel = conv.weight.clone()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.train == [mode != "eval"] * 3 + [True]
    assert tracked(bench.f) == updates
    expected = torch.zeros(6)
    for seen in passes.inputs[-updates:]:
        expected = 0.9 * expected + 0.1 * nn.functional.conv2d(seen, kernel).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.track_running_stats


def test_the_batch_is_crafted_with_its_own_statistics_in_train_mode() -> None:
    """Modes matter: the same start and the same weights give other images."""
    crafted = {}
    for mode in ("eval", "train"):
        bench, (x, y) = Bench(ATPGD(steps=2, step_factor=0.2, bn_mode_attack=mode)), batch()  # type: ignore[arg-type]
        with Probe(bench.f) as passes:
            bench.step(x, y)
        crafted[mode] = passes.inputs
    assert torch.equal(crafted["eval"][0], crafted["train"][0])
    assert not torch.equal(crafted["eval"][-1], crafted["train"][-1])


@pytest.mark.parametrize("how", ["clipped", "uniform", "gaussian"])
def test_iterates_stay_in_the_ball_and_start_where_they_should(how: Any) -> None:
    threat = ThreatModel("linf", 0.2)
    bench, (x, y) = Bench(ATPGD(steps=5, start=how), threat=threat), batch()
    x = (x - 0.35).clamp(0, 1)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    for seen in passes.inputs[1:]:
        assert bool(threat.contains(seen, x).all())
    start = threat.random_start(x, generator("step", 0))
    if how == "gaussian":
        start = x + 0.001 * torch.randn(x.shape, generator=generator("step", 0))
    torch.testing.assert_close(passes.inputs[0], start.clamp(0, 1) if how == "clipped" else start)
    assert (float(passes.inputs[0].min()) < 0) == (how != "clipped")
    assert ATPGD().start == "clipped"
    assert float((passes.inputs[-1] - x).abs().max()) == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_the_loss_on_a_linear_model_is_that_of_the_worst_corner(objective: Any) -> None:
    """Two classes: the worst point of the box of radius .1 is x + .1 sign(w_other - w_y)."""
    bench = Bench(ATPGD(steps=4, objective=objective), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
    x = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2)
    ((_, loss),) = bench.step(x, torch.tensor([0, 1]))
    # sample 0: x = (.4, .5), z = (-.6, .5), label 0; sample 1: x = (.4, .5) as well, label 1
    expected = (math.log(1 + math.exp(1.1)) + math.log(1 + math.exp(-1.1))) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


def test_l2_steps_follow_the_normalised_gradient() -> None:
    threat = ThreatModel("l2", 0.25)
    bench = Bench(ATPGD(steps=8, step_factor=40.0), lambda: linear_network([[3.0, 0.0], [0.0, 4.0]]), threat)
    with Probe(bench.f) as passes:
        bench.step(torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]))
    torch.testing.assert_close(passes.inputs[-1].flatten(), torch.tensor([0.5 - 0.15, 0.5 + 0.2]), rtol=0, atol=1e-5)


def test_no_radius_is_standard_training() -> None:
    bench, (x, y) = Bench(ATPGD(steps=2), threat=ThreatModel("linf", 0.0)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert torch.equal(passes.inputs[-1], x)


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(ATPGD(steps=3), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.05)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(80)]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("mode", ["eval", "train_update"])
def test_the_clean_forward_comes_after_the_update_and_moves_only_the_statistics(mode: Any) -> None:
    weights = []
    for extra in (False, True):
        bench, (x, y) = Bench(ATPGD(steps=2, clean_forward=extra, bn_mode_attack=mode)), batch()
        with Probe(bench.f) as passes:
            bench.step(x, y)
        weights.append(parameters(bench.f))
        assert tracked(bench.f) == (1 if mode == "eval" else 3) + extra
        assert ("train_clean" in bench.ctx.logs) == extra
    assert same(*weights)
    assert passes.train[-1] and torch.equal(passes.inputs[-1], x) and passes.backwards == 3
    bench.step(x, y)
    assert 0 <= float(bench.ctx.logs["train_clean"]) <= 1


def test_predicted_labels_move_away_from_the_prediction_and_see_no_label() -> None:
    """z_0 - z_1 = a - 3 b = -.7: the prediction is 1, so the corner is (+, -) whatever the label is."""
    for label in (0, 1):
        bench = Bench(ATPGD(steps=4, attack_labels="predicted"), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
        with Probe(bench.f) as passes:
            bench.step(torch.tensor([0.5, 0.4]).view(1, 1, 1, 2), torch.tensor([label]))
        torch.testing.assert_close(passes.inputs[-1].flatten(), torch.tensor([0.6, 0.3]))
        assert len(passes.inputs) == 4 + 2 and passes.backwards == 5


# --- schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fraction", "radius", "steps", "size"),
    [(0.0, 0.0, 3, 0.0), (0.15, 0.15, 3, 0.1), (0.3, 0.3, 5, 0.12), (0.79, 0.3, 5, 0.12), (0.8, 0.3, 7, 0.6 / 7)],
)
def test_the_mnist_recipe_can_be_said(fraction: float, radius: float, steps: int, size: float) -> None:
    defense = ATPGD(steps=3, step_factor=2.0, ramp=0.3, plan=((0.3, 5), (0.8, 7)))
    ascent = defense.ascent(ThreatModel("linf", 0.3), fraction)
    assert (ascent.threat.radius, ascent.steps, ascent.step_size) == pytest.approx((radius, steps, size))


def test_the_step_size_may_be_absolute() -> None:
    ascent = ATPGD(steps=40, step_size="1/100", ramp=0.5).ascent(ThreatModel("linf", 0.3), 0.25)  # type: ignore[arg-type]
    assert (ascent.threat.radius, ascent.steps, ascent.step_size) == pytest.approx((0.15, 40, 0.01))


def test_the_schedule_is_followed_in_a_step() -> None:
    bench, (x, y) = Bench(ATPGD(steps=2, ramp=0.5, plan=((0.5, 4),))), batch()
    counts, reached = [], []
    for fraction in (0.25, 0.6):
        with Probe(bench.f) as passes:
            bench.step(x, y, fraction)
        counts.append(len(passes.inputs))
        reached.append(float((passes.inputs[-1] - x).abs().max()))
    assert counts == [3, 5]
    assert reached == pytest.approx([LINF.radius / 2, LINF.radius], abs=1e-6)


def test_a_plan_out_of_order_is_refused() -> None:
    with pytest.raises(UserError, match=r"plan: the fractions must ascend, not 0.8, 0.3"):
        ATPGD(plan=((0.8, 7), (0.3, 5)))


# --- crafting -----------------------------------------------------------------------------------------------


def test_crafting_puts_everything_back_even_after_an_error() -> None:
    f = Bench(ATPGD()).f.train()
    f.body["conv"].eval()
    f.head.bias.requires_grad_(False)
    modes = [m.training for m in f.modules()]
    with pytest.raises(RuntimeError, match="inside"), crafting(f, bn="train"):
        assert all(m.training for m in f.modules()) and not any(p.requires_grad for p in f.parameters())
        raise RuntimeError("inside")
    assert [m.training for m in f.modules()] == modes
    assert [p.requires_grad for p in f.parameters()] == [True] * 4 + [False]
    assert f.body["conv"][1].track_running_stats  # type: ignore[index]
