"""APGD against a plain transcript of its paper, against answers worked out by hand, and what it pays."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_toys import Counter, digits, linear_system, system, trained_network
from test_attack_engine import Hill, Inexact, ramp, standing
from test_attack_gradient import away_from, linear_problem
from torch import Tensor, nn

from casemate.attacks import engine
from casemate.attacks.apgd import APGD, APGDT, checkpoints, targets_of
from casemate.attacks.chunk import unit_noise
from casemate.attacks.diagnostics import AttackWarning
from casemate.errors import UserError
from casemate.objectives import dlr
from casemate.seeding import generator
from casemate.threat import ThreatModel, targeted, untargeted


class Recorder(nn.Module):
    """Keeps every image it is shown."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        out: Tensor = self.inner(x)
        return out


@functools.cache
def smooth_network() -> nn.Module:
    """For the digits. In double precision, and without a maximum whose ties rounding would break, the order of a sum
    decides nothing, so iterates can be compared to the end."""
    torch.manual_seed(0)
    x, y = digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(x[:1500].double()), y[:1500]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


# --- the algorithm ------------------------------------------------------------------------------------------------


def test_checkpoints_of_100_steps() -> None:
    marks = checkpoints(100)
    assert list(marks) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(marks.values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9, 10] and list(checkpoints(1)) == [1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_start_lies_at_the_full_radius_and_the_first_step_is_twice_that(norm: Any) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, -2.0, 1.0, 0.5]])
    recorder = Recorder(linear_system(weight, torch.tensor([5.0, 0.0])).classifier)
    x, threat = torch.full((6, 1, 1, 4), 0.5), ThreatModel(norm, 0.1)
    APGD(steps=2)(system(recorder, (1, 1, 4), 2), x, untargeted(torch.zeros(6, dtype=torch.long)), threat)
    start, after = (seen - x for seen in recorder.seen[:2])
    apart = threat.distance(recorder.seen[0], x)
    assert torch.allclose(apart, torch.full((6,), 0.1)) and not torch.allclose(start[0], start[1])
    if norm == "linf":  # from any corner of the ball 0.2 leads to the best one
        assert torch.allclose(after, 0.1 * weight[1].sign().expand(6, 1, 1, 4))
    else:
        way = weight[1] / weight[1].norm()
        moved = start.flatten(1) + 0.2 * way
        assert torch.allclose(after.flatten(1), 0.1 * moved / moved.norm(dim=1, keepdim=True), atol=1e-6)


def transcript(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """Algorithm 1 of the paper for one image, written from it: the iterate of the highest cross-entropy."""

    def evaluate(at: Tensor) -> tuple[float, Tensor]:
        leaf = at.clone().requires_grad_()
        loss = F.cross_entropy(model(leaf), y)
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    def ascent(at: Tensor, gradient: Tensor, eta: float) -> Tensor:
        step = gradient.sign() if threat.norm == "linf" else gradient / gradient.norm()
        return threat.project(at + eta * step, x)

    eta, at = 2 * threat.radius, threat.project(start, x)
    value, gradient = evaluate(at)
    best, f_max, best_gradient = at, value, gradient
    before, at = at, ascent(at, gradient, eta)
    values, rises, halved, f_then, w = [value], 0, True, value, checkpoints(steps)
    for k in range(1, steps + 1):
        value, gradient = evaluate(at)
        rises += value > values[-1]
        values.append(value)
        if value > f_max:
            best, f_max, best_gradient = at, value, gradient
        if k in w:
            if rises <= 0.75 * w[k] or (not halved and f_then == f_max):
                eta, at, gradient, halved, values = eta / 2, best, best_gradient, True, [f_max]
            else:
                halved = False
            f_then, rises = f_max, 0
        z = ascent(at, gradient, eta)
        before, at = at, threat.project(at + 0.75 * (z - at) + 0.25 * (at - before), x)
    return best


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_hundred_steps_are_those_of_the_paper(norm: Any) -> None:
    x, y = digits()
    x, y = x[1500:1506].double(), y[1500:1506]
    threat, model = ThreatModel(norm, 0.12 if norm == "linf" else 0.6), smooth_network()
    victim = Inexact(model, input_shape=(1, 8, 8), num_classes=10)  # so that no image leaves
    found = APGD()(victim, x, untargeted(y), threat, seed=3).x_adv
    start = x + threat.radius * unit_noise(threat.norm, x, generator(3, "apgd", 0))
    for i in range(len(x)):
        one = slice(i, i + 1)
        expected = transcript(model, x[one], y[one], start[one], threat, 100)
        assert torch.allclose(found[one], expected, atol=1e-9), i


def test_the_step_shrinks_until_a_peak_between_two_steps_is_met() -> None:
    victim = Inexact(Hill(), input_shape=(1, 1, 1), num_classes=2)
    x, goal = torch.tensor([0.41, 0.28, 0.63]).view(3, 1, 1, 1), untargeted(torch.zeros(3, dtype=torch.long))
    result = APGD(objective="margin")(victim, x, goal, ThreatModel("linf", 0.4))
    assert torch.allclose(result.x_adv, torch.tensor(0.5), atol=0.01)


# --- what it finds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_two_linear_classes_it_succeeds_exactly_within_the_distance(norm: Any, objective: Any) -> None:
    victim, x, y, linf, l2 = linear_problem(2)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    clear = away_from(distances, radius)
    result = APGD(steps=50, objective=objective)(victim, x, untargeted(y), ThreatModel(norm, radius))
    assert torch.equal(result.success[clear], (distances < radius)[clear])
    assert 10 < int(result.success.sum()) < 50


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_five_linear_classes_the_targets_together_reach_exactly_the_distance(norm: Any) -> None:
    victim, x, y, linf, l2 = linear_problem(5)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    threat, clear = ThreatModel(norm, radius), away_from(distances, radius)
    within = (distances < radius)[clear]
    assert torch.equal(APGDT(steps=50)(victim, x, untargeted(y), threat).success[clear], within)
    for attack in (APGD(steps=50), APGD(steps=50, objective="dlr", restarts=2)):
        found = attack(victim, x, untargeted(y), threat).success[clear]
        assert not (found & ~within).any() and int(found.sum()) >= 0.85 * int(within.sum())


def test_towards_a_target_it_climbs_the_targeted_loss() -> None:
    victim, x, y, *_ = linear_problem(5)
    target = (y + 2) % 5
    goal = targeted(y, target)
    weight = victim.classifier[1].weight.detach()
    with torch.no_grad():
        z = victim.logits(x)
    gap = (z.gather(1, y[:, None]) - z.gather(1, target[:, None]))[:, 0]
    too_far = gap / (weight[y] - weight[target]).abs().sum(1) > 0.2
    for attack in (APGD(objective="dlr"), APGD(objective="ce"), APGDT()):
        result = attack(victim, x, goal, ThreatModel("linf", 0.2))
        assert torch.equal(result.prediction[result.success], target[result.success])
        assert int(result.success.sum()) > 20 and not result.success[too_far].any()


def test_at_radius_one_half_nothing_stands() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    for attack in (APGD(steps=20), APGD(steps=20, objective="dlr"), APGDT(steps=20)):
        assert attack(victim, x[1500:], untargeted(y[1500:]), ThreatModel("linf", 0.5)).success.all()


def test_results_lie_in_ball_and_box_and_follow_the_seed() -> None:
    x, y = digits()
    victim, goal = system(trained_network(), (1, 8, 8), 10), untargeted(y[:24])
    for norm, radius in (("linf", 0.1), ("l2", 0.5)):
        threat = ThreatModel(norm, radius)  # type: ignore[arg-type]
        for attack in (APGD(steps=10, restarts=2), APGDT(steps=5)):
            one, again, other = (attack(victim, x[:24], goal, threat, seed).x_adv for seed in (1, 1, 2))
            assert torch.equal(one, again) and not torch.equal(one, other)
            assert (threat.distance(one, x[:24]) <= radius + 1e-6).all() and one.min() >= 0 and one.max() <= 1


# --- targets ------------------------------------------------------------------------------------------------------


def test_targets_are_the_largest_other_classes_in_order() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 4.0], [0.0, 3.0, 2.0, 1.0]])
    assert targets_of(untargeted(torch.tensor([0, 0])), logits, 9).tolist() == [[3, 2, 1], [1, 2, 3]]
    assert targets_of(untargeted(torch.tensor([0, 1])), logits, 2).tolist() == [[3, 2], [2, 3]]
    aimed = targeted(torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert targets_of(aimed, logits, 9).tolist() == [[1], [0]]


@pytest.mark.parametrize("classes", [2, 3])
def test_without_a_targeted_dlr_it_climbs_the_difference_and_says_so(classes: int) -> None:
    victim, x, y, linf, _ = linear_problem(classes)
    radius = float(linf.median())
    clear = away_from(linf, radius)
    with pytest.warns(AttackWarning, match=f"{classes} classes there is no .*DLR: targeted runs climb z_t - z_y"):
        result = APGDT(steps=50)(victim, x, untargeted(y), ThreatModel("linf", radius))
    assert torch.equal(result.success[clear], (linf < radius)[clear])
    if classes == 2:
        with pytest.raises(UserError, match="objective dlr needs 3 classes, and there are 2: use margin"):
            APGD(objective="dlr")(victim, x, untargeted(y), ThreatModel("linf", radius))
    with pytest.raises(UserError, match="objective dlr towards a target needs 4 classes"):
        dlr(torch.zeros(1, classes), targeted(torch.tensor([0]), torch.tensor([1])))


# --- passes -------------------------------------------------------------------------------------------------------


def test_a_hundred_steps_cost_101_forwards_and_100_input_gradients() -> None:
    victim, counter, x, goal = standing()
    paid: list[Tensor] = []
    for parameter in counter.parameters():
        parameter.register_hook(paid.append)
    result = APGD()(victim, x, goal, ThreatModel("linf", 0.001))
    assert counter.forwards == [8] * 101 + [8]  # and the verification
    assert counter.gradients == [8] * 100
    assert not paid and all(p.grad is None for p in counter.parameters()) and not result.x_adv.requires_grad
    assert result.cost.forwards.tolist() == [101] * 8 and result.cost.backwards.tolist() == [100] * 8
    assert result.cost.queries.tolist() == [1] * 8
    assert APGD().passes(victim.views()["adaptive"], 8) == (800, 800, 8)


def test_nine_targets_cost_909_forwards_and_900_input_gradients_and_one_clean_query() -> None:
    victim, counter, x, goal = standing(2)
    result = APGDT()(victim, x, goal, ThreatModel("linf", 0.001))
    assert counter.forwards == [2] * (1 + 909 + 1) and counter.gradients == [2] * 900
    assert result.cost.forwards.tolist() == [901] * 2 and result.cost.backwards.tolist() == [900] * 2
    assert result.cost.queries.tolist() == [10] * 2
    assert APGDT().passes(victim.views()["adaptive"], 2) == (1800, 1800, 20)


def test_each_image_pays_until_it_falls_and_its_first_success_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "COMPACT_ABOVE", 0.0)
    victim, counter, x, goal = ramp()  # a radius of 0.2 does not suffice for the last
    result = APGD(steps=3)(victim, x, goal, ThreatModel("linf", 0.2))
    assert result.success.tolist() == [True, True, True, False]
    assert torch.allclose(result.x_adv.flatten()[3], torch.tensor(0.3))
    sizes = counter.forwards
    assert sizes[0] == 4 and sizes[2:4] == [1, 1] and sizes[-1] == 4  # the step to the corner fells the other three
    assert result.cost.forwards.tolist()[3] == 4 and result.cost.queries.tolist() == [0, 0, 0, 1]
    assert sum(sizes) == int((result.cost.forwards + result.cost.queries).sum())


def test_restarts_and_targets_are_only_run_on_what_still_stands() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim, goal, threat = system(counter, (1, 8, 8), 10), untargeted(y[:100]), ThreatModel("linf", 0.08)
    result = APGDT(steps=4, restarts=2)(victim, x[:100], goal, threat)
    assert counter.forwards[0] == 100 and counter.forwards[1:-1] == sorted(counter.forwards[1:-1], reverse=True)
    assert sum(counter.forwards) == int((result.cost.forwards + result.cost.queries).sum())
    assert sum(counter.gradients) == int(result.cost.backwards.sum())
    assert counter.forwards[1] < 100  # clean errors are not searched
    wrong = victim.decide(x[:100]) != y[:100]
    assert wrong.any() and torch.equal(result.x_adv[wrong], x[:100][wrong])
    counter.forwards.clear()
    again = APGD(steps=4, restarts=3)(victim, x[:100], goal, threat)
    assert counter.forwards[0] == 100 and int((~again.success).sum()) <= counter.forwards[-2] < 100


def test_check_every_changes_the_cost_and_not_the_result() -> None:
    x, y = digits()
    victim, goal, threat = system(smooth_network(), (1, 8, 8), 10), untargeted(y[:60]), ThreatModel("linf", 0.1)
    often, seldom = (APGD(steps=12, check_every=k)(victim, x[:60].double(), goal, threat) for k in (1, 5))
    assert torch.allclose(often.x_adv, seldom.x_adv, atol=1e-9)
    assert often.cost.forwards.sum() < seldom.cost.forwards.sum()


# --- what a result depends on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_do_not_depend_on_when_fallen_images_leave_nor_on_the_fate_of_others(
    norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = digits()
    x, y, threat = x[1500:1560].double(), y[1500:1560], ThreatModel(norm, 0.1 if norm == "linf" else 0.5)
    victim = system(smooth_network(), (1, 8, 8), 10)
    for attack in (APGD(steps=30, restarts=2), APGDT(steps=10, targets=3)):
        results = []
        for share in (0.0, 0.1, 1.0):
            monkeypatch.setattr(engine, "COMPACT_ABOVE", share)
            results.append(attack(victim, x, untargeted(y), threat))
        soon, usual, never = results
        assert torch.allclose(soon.x_adv, never.x_adv, atol=1e-9)
        assert torch.allclose(usual.x_adv, never.x_adv, atol=1e-9)
        assert soon.cost.forwards.sum() <= usual.cost.forwards.sum() < never.cost.forwards.sum()
        labels = y.clone()
        labels[::2] = (labels[::2] + 1) % 10  # wrong from the start
        among = attack(victim, x, untargeted(labels), threat)
        assert torch.allclose(among.x_adv[1::2], never.x_adv[1::2], atol=1e-9)
        assert not never.success.all() and among.success[::2].all()


def test_on_a_view_that_is_not_exact_every_step_is_made_and_the_highest_objective_kept() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim = Inexact(counter, input_shape=(1, 8, 8), num_classes=10)
    attack, goal, threat = APGD(steps=15, restarts=2), untargeted(y[:20]), ThreatModel("linf", 0.3)
    result = attack(victim, x[:20], goal, threat)
    assert counter.forwards == [20] * (2 * 16 + 1) and counter.gradients == [20] * 30
    assert result.cost.forwards.tolist() == [31] * 20 and result.cost.queries.tolist() == [2] * 20
    single = APGD(steps=15)(victim, x[:20], goal, threat)
    with torch.no_grad():
        one, two = (F.cross_entropy(trained_network()(r.x_adv), y[:20], reduction="none") for r in (single, result))
    assert (two >= one - 1e-5).all() and (two > one + 1e-3).any()
    counter.forwards.clear()
    APGDT(steps=2, targets=3)(victim, x[:20], goal, threat)
    assert counter.forwards == [20] * (1 + 3 * 3 + 1)
