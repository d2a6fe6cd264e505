"""Bilateral adversarial training: the labels' closed form, the four targets, the step, passes and modes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, tracked
from torch import nn

from casemate.defenses.bilateral import Bilateral, adversarial_labels, nearest_boundary
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.seeding import generator
from casemate.threat import ThreatModel

WEIGHT = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "beta"), [(10, 9.0), (4, 2.0), (100, 9.0), (2, 9.0)])
def test_labels_sum_to_one_and_keep_beta_times_the_largest_other(classes: int, beta: float) -> None:
    rng = torch.Generator().manual_seed(0)
    chances = (4 * torch.randn(200, classes, generator=rng)).double().softmax(1)
    y = torch.randint(classes, (200,), generator=rng)
    labels = adversarial_labels(chances, y, beta, 0.01)
    own = labels.gather(1, y[:, None])[:, 0]
    others = labels.scatter(1, y[:, None], -1.0)
    torch.testing.assert_close(labels.sum(1), torch.ones(200).double())
    torch.testing.assert_close(own, beta * others.amax(1))
    assert bool((labels > 0).all())
    moved_mass = 1 - own
    assert float(moved_mass.min()) >= 1 / (1 + beta) - 1e-9
    assert float(moved_mass.max()) <= 1 / (1 + beta / (classes - 1)) + 1e-9
    assert not labels.requires_grad


def test_labels_by_hand() -> None:
    """p = (.7, .2, .1), y = 0: v - v_min is 0 and log 2."""
    found = adversarial_labels(torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([0]), 9.0, 0.01)
    low, high = 0.01, math.log(2) + 0.01
    moved_mass = 1 / (1 + 9 * high / (low + high))
    expected = [1 - moved_mass, moved_mass * low / (low + high), moved_mass * high / (low + high)]
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-5, atol=1e-6)
    assert expected[2] > expected[1], "the unlikelier class gets more"


def test_where_all_wrong_classes_are_alike_it_is_label_smoothing() -> None:
    chances = torch.tensor([[0.55] + [0.05] * 9])
    found = adversarial_labels(chances, torch.tensor([0]), 9.0, 0.01)
    torch.testing.assert_close(found, torch.tensor([[0.5] + [0.5 / 9] * 9]))


# --- targets ------------------------------------------------------------------------------------------------


def aim(target: Any, logits: list[list[float]], labels: list[int], weight: Any = WEIGHT) -> list[int]:
    f = linear_network(weight)
    rng = generator("targets")
    return Bilateral(target=target).aim(torch.tensor(logits), torch.tensor(labels), f, rng).tolist()


def test_the_most_confusing_class_is_the_likeliest_wrong_one() -> None:
    assert aim("most_confusing", [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 1.0, 9.0]], [0, 1, 2]) == [2, 0, 1]


def test_random_targets_are_uniform_over_the_wrong_classes() -> None:
    found = torch.tensor(aim("random", [[0.0, 0.0, 0.0]] * 3000, [1] * 3000))
    counts = torch.bincount(found, minlength=3).tolist()
    assert counts[1] == 0 and abs(counts[0] - 1500) < 150


def test_the_nearest_boundary_is_a_margin_over_a_distance_of_weights() -> None:
    weight = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]])
    logits = torch.tensor([[3.0, 0.0, 1.0], [3.0, 4.0, 5.0], [1.0, 1.0, 0.5]])
    # row 0: 3 / 10 against 2 / 1; row 1: every margin is negative; row 2: a tie does not count, .5 / 1 does
    found = nearest_boundary(logits, torch.tensor([0, 0, 0]), weight, torch.tensor([-1, -1, -1]))
    assert found.tolist() == [1, -1, 2]


def test_mosa_and_mix_differ_where_the_prediction_is_wrong() -> None:
    weight = [[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]]
    logits, labels = [[3.0, 0.0, 1.0], [3.0, 4.0, 1.0], [1.0, 2.0, 3.0]], [0, 0, 0]
    # right: nearest (1); wrong with one positive margin: that one (2), or the likeliest (1); wrong with none: 2
    assert aim("mosa", logits, labels, weight) == [1, 2, 2]
    assert aim("mix", logits, labels, weight) == [1, 1, 2]
    assert aim("most_confusing", logits, labels, weight) == [2, 1, 2]


@pytest.mark.parametrize("target", ["most_confusing", "random", "mosa", "mix"])
def test_no_target_is_the_label(target: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    logits, y = torch.randn(400, 3, generator=rng), torch.randint(3, (400,), generator=rng)
    found = torch.tensor(aim(target, logits.tolist(), y.tolist()))
    assert bool((found != y).all()) and bool(((found >= 0) & (found < 3)).all())


def test_a_nearest_boundary_needs_a_linear_head() -> None:
    def network() -> Classifier:
        head = nn.Sequential(nn.Linear(36, 4))
        return Classifier(input_shape=(1, 6, 6), num_classes=4, layers={"flat": nn.Flatten()}, head=head)

    Bench(Bilateral(), network)
    for target in ("mosa", "mix"):
        with pytest.raises(UserError, match=f"target '{target}' needs a linear last layer, not Sequential"):
            Bench(Bilateral(target=target), network)  # type: ignore[arg-type]


# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_passes_and_modes_of_a_step(steps: int) -> None:
    bench, (x, y) = Bench(Bilateral(steps=steps)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * (1 + steps) + [False]
    assert passes.train == [False] * (1 + steps) + [True]
    assert passes.backwards == steps + 1
    assert tracked(bench.f) == 1
    assert torch.equal(passes.inputs[0], x)
    assert moved(before, bench.f)


def test_the_step_goes_towards_the_target_from_a_start_that_is_not_cut() -> None:
    bench, (x, y) = Bench(Bilateral()), batch()
    x = (x - 0.3).clamp(0, 1)
    f = copy.deepcopy(bench.f).eval()
    target = f(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    start = LINF.random_start(x, generator("step", 0)).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(f(start), target), start)
    expected = start.detach() - LINF.radius * gradient.sign()
    expected = torch.minimum(torch.maximum(expected, x - LINF.radius), x + LINF.radius).clamp(0, 1)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert float(passes.inputs[1].min()) < 0
    torch.testing.assert_close(passes.inputs[1], start.detach())
    torch.testing.assert_close(passes.inputs[2], expected)


@pytest.mark.parametrize(("adversary", "beta", "gamma"), [(True, 9.0, 0.01), (True, 3.0, 0.2), (False, 9.0, 0.01)])
def test_the_loss_by_hand(adversary: bool, beta: float, gamma: float) -> None:
    bench = Bench(Bilateral(label_adversary=adversary, beta=beta, gamma=gamma), lambda: linear_network(WEIGHT))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, y)
    w, targets = torch.tensor(WEIGHT).double(), []
    for image, label in zip(x.view(2, 2).double(), y.tolist(), strict=True):
        p = (w @ image).softmax(0)
        v = {k: -math.log(p[k] + 1e-8) for k in range(3) if k != label}
        low, top = min(v.values()), max(v.values())
        total = sum(value - low + gamma for value in v.values())
        mass = 1 / (1 + beta * (top - low + gamma) / total) if adversary else 0.0
        targets.append([1 - mass if k == label else mass * (v[k] - low + gamma) / total for k in range(3)])
    z = passes.inputs[-1].view(2, 2).double() @ w.T
    expected = -(torch.tensor(targets).double() * z.log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert float(bench.ctx.logs["label_kept"]) == pytest.approx((targets[0][0] + targets[1][1]) / 2, rel=1e-5)


@pytest.mark.parametrize("target", ["most_confusing", "random", "mosa", "mix"])
def test_the_target_that_was_chosen_is_the_one_aimed_at(target: Any) -> None:
    """On a linear model the sign step towards t is sign(w_t - sum p_k w_k); classes here differ in one pixel each."""
    weight = torch.eye(4).repeat_interleave(9, 1)
    head = nn.Linear(36, 4, bias=False)
    head.weight.data = weight.clone()
    f = Classifier(input_shape=(1, 6, 6), num_classes=4, layers={"flat": nn.Flatten()}, head=head)
    bench, (x, y) = Bench(Bilateral(target=target), lambda: f), batch()
    rng = generator("step", 0)
    LINF.random_start(x, rng)
    aims = Bilateral(target=target).aim(f(x).detach(), y, f, rng)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    change = (passes.inputs[2] - passes.inputs[1]).flatten(1).view(len(x), 4, 9)
    assert torch.equal(change.mean(2).argmax(1), aims)


def test_no_radius_and_no_label_adversary_is_standard_training() -> None:
    bench, (x, y) = Bench(Bilateral(label_adversary=False), threat=ThreatModel("linf", 0.0)), batch()
    expected = F.cross_entropy(copy.deepcopy(bench.f).train()(x), y)
    ((_, loss),) = bench.step(x, y)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_it_learns_one_batch() -> None:
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU())
    torch.manual_seed(0)
    f = Classifier(input_shape=(1, 6, 6), num_classes=4, layers={"fc": hidden}, head=nn.Linear(16, 4))
    threat = ThreatModel("linf", 0.02)
    bench, (x, y) = Bench(Bilateral(), lambda: f, threat, lr=0.02, optimizer=torch.optim.Adam), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(100)]
    assert losses[-1] < losses[0] - 0.3
    assert bool((f(x).argmax(1) == y).all())
