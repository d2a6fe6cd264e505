"""FAB-T: its projection against linear programming, its distances against closed forms, and what it pays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from scipy.optimize import linprog
from test_attack_apgd import smooth_network
from test_attack_engine import Inexact, standing
from test_attack_gradient import away_from, linear_problem
from torch import Tensor

from casemate.attacks import engine
from casemate.attacks.fab import FABT, FABNorm, to_hyperplane
from casemate.objectives import margin
from casemate.threat import ThreatModel, targeted, untargeted

# --- the projection -----------------------------------------------------------------------------------------------


def problem(n: int = 40, d: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """(points 1 x n x d, some of them on the walls; normals, some of them partly zero; needs, some out of reach)."""
    rng = torch.Generator().manual_seed(0)
    at = (torch.rand(n, d, generator=rng, dtype=torch.double) * 1.4 - 0.2).clamp(0, 1)
    normal = torch.randn(n, d, generator=rng, dtype=torch.double)
    normal[torch.rand(n, d, generator=rng) < 0.15] = 0
    need = torch.randn(n, generator=rng, dtype=torch.double) * torch.linspace(0.05, 4, n, dtype=torch.double)
    return at[None], normal, need[None]


def test_in_linf_it_solves_the_linear_programme() -> None:
    at, normal, need = problem()
    moves = to_hyperplane(at, normal, need, "linf")[0]
    reachable = 0
    for x, w, r, move in zip(at[0].numpy(), normal.numpy(), need[0].numpy(), moves.numpy(), strict=True):
        d = len(x)  # variables: the move and its length t; |move_i| <= t
        eye, ones = np.eye(d), np.ones((d, 1))
        done = linprog(
            np.r_[np.zeros(d), 1.0], A_ub=np.r_[np.c_[eye, -ones], np.c_[-eye, -ones]], b_ub=np.zeros(2 * d),
            A_eq=np.r_[w, 0.0][None], b_eq=[r], bounds=[*zip(-x, 1 - x, strict=True), (0, None)],
        )  # fmt: skip
        assert ((x + move >= -1e-12) & (x + move <= 1 + 1e-12)).all()
        if done.status == 0:
            reachable += 1
            assert w @ move == pytest.approx(r, abs=1e-9) and np.abs(move).max() == pytest.approx(done.fun, abs=1e-7)
        else:
            corner = np.where(np.sign(r) * w > 0, 1.0, 0.0)
            assert np.allclose((x + move)[w != 0], corner[w != 0])
    assert 10 < reachable < len(need[0])


def test_in_l2_it_is_the_nearest_point_of_the_plane_in_the_box() -> None:
    """The optimum is clip(m * w) for one m: found here by bisection."""
    at, normal, need = problem()
    moves = to_hyperplane(at, normal, need, "l2")[0]
    reachable = 0
    for x, w, r, move in zip(at[0].numpy(), normal.numpy(), need[0].numpy(), moves.numpy(), strict=True):
        low, high = (-1e6, 0.0) if r < 0 else (0.0, 1e6)
        for _ in range(200):
            m = (low + high) / 2
            low, high = (m, high) if w @ np.clip(m * w, -x, 1 - x) < r else (low, m)
        expected = np.clip(high * w, -x, 1 - x)
        if abs(w @ expected - r) < 1e-8:
            reachable += 1
        assert np.allclose(move, expected, atol=1e-7)
    assert 10 < reachable < len(need[0])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_point_on_the_plane_stays_and_a_plane_without_a_slope_moves_nothing(norm: Any) -> None:
    at, normal, _ = problem()
    assert not to_hyperplane(at, normal, torch.zeros(1, 40, dtype=torch.double), norm).any()
    assert not to_hyperplane(at, 0 * normal, torch.ones(1, 40, dtype=torch.double), norm).any()


def test_two_points_of_an_image_share_its_plane() -> None:
    at, normal, need = problem()
    both = torch.cat([at, at.flip(2)])
    needs = torch.cat([need, 2 * need])
    apart = [to_hyperplane(both[k : k + 1], normal, needs[k : k + 1], "linf") for k in range(2)]
    assert torch.allclose(to_hyperplane(both, normal, needs, "linf"), torch.cat(apart))


# --- distances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_linear_classes_the_distance_is_the_smallest_within_one_percent(classes: int, norm: Any) -> None:
    victim, x, y, linf, l2 = linear_problem(classes)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    threat = ThreatModel(norm, radius)
    result = FABNorm(steps=20)(victim, x, untargeted(y), threat)
    found = threat.distance(result.x_adv, x)
    free = ((result.x_adv > 0) & (result.x_adv < 1)).flatten(1).all(1)
    assert int(free.sum()) > 40 and (found[free] / distances[free] - 1).abs().max() < 0.01
    assert (found[free] >= distances[free] * 0.9999).all()
    assert (result.prediction != y)[free].all()  # also beyond the radius, where it is no success
    assert torch.equal(result.success, (result.prediction != y) & (found <= radius + 1e-5))
    assert 10 < int(result.success.sum()) < 50

    inside = FABT(steps=20)(victim, x, untargeted(y), threat)
    clear = away_from(distances, radius)
    assert torch.equal(inside.success[clear], (distances < radius)[clear])
    assert torch.equal(inside.x_adv[~inside.success], x[~inside.success])


def test_a_wall_makes_the_way_longer() -> None:
    """z_1 - z_0 = a + b - 1.2 from (0.95, 0): together 0.25, of which the first pixel can give 0.05."""
    victim = linear_system(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([1.2, 0.0]))
    x, goal = torch.tensor([0.95, 0.0]).view(1, 1, 1, 2), untargeted(torch.tensor([0]))
    result = FABNorm()(victim, x, goal, ThreatModel("linf", 0.3))
    assert float((result.x_adv - x).abs().max()) == pytest.approx(0.2, rel=0.01) and result.success.all()
    assert not FABT()(victim, x, goal, ThreatModel("linf", 0.19)).success.any()
    assert FABT()(victim, x, goal, ThreatModel("linf", 0.21)).success.all()


def test_towards_a_target_only_that_class_counts() -> None:
    victim, x, y, *_ = linear_problem(5)
    target = (y + 1) % 5
    result = FABNorm(steps=30)(victim, x, targeted(y, target), ThreatModel("linf", 0.2))
    moved = (result.x_adv != x).flatten(1).any(1)
    assert int(moved.sum()) > 40 and torch.equal(result.prediction[moved], target[moved])
    assert not result.success[~moved].any()


def test_restarts_from_random_points_never_leave_it_farther_away() -> None:
    x, y = digits()
    victim, goal, threat = system(trained_network(), (1, 8, 8), 10), untargeted(y[:30]), ThreatModel("l2", 1.0)
    one, two = (FABNorm(steps=12, targets=2, restarts=r)(victim, x[:30], goal, threat) for r in (1, 2))
    reach = [threat.distance(r.x_adv, x[:30]) for r in (one, two)]
    assert (one.prediction != y[:30]).all()
    assert (reach[1] <= reach[0]).all() and (reach[1] < reach[0] - 1e-4).any()


# --- passes -------------------------------------------------------------------------------------------------------


def test_nine_targets_cost_900_gradients_and_900_checks_and_one_clean_query() -> None:
    victim, counter, x, goal = standing(2)
    paid: list[Tensor] = []
    for parameter in counter.parameters():
        parameter.register_hook(paid.append)
    result = FABT()(victim, x, goal, ThreatModel("linf", 0.001))
    assert counter.forwards == [2] * (1 + 1800 + 1) and counter.gradients == [2] * 900
    assert not paid and not result.x_adv.requires_grad and torch.equal(result.x_adv, x)
    assert result.cost.forwards.tolist() == [901] * 2 and result.cost.backwards.tolist() == [900] * 2
    assert result.cost.queries.tolist() == [901] * 2
    assert FABT().passes(victim.views()["adaptive"], 2) == (1800, 1800, 1802)


def test_an_image_pays_until_a_success_lies_inside_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits()
    x, y, threat = x[:60].double(), y[:60], ThreatModel("linf", 0.1)
    counter = Counter(smooth_network())
    victim, results = system(counter, (1, 8, 8), 10), []
    for share in (0.0, 0.1, 1.0):
        monkeypatch.setattr(engine, "COMPACT_ABOVE", share)
        counter.forwards.clear(), counter.gradients.clear()
        results.append(FABT(steps=10, targets=3)(victim, x, untargeted(y), threat))
        assert sum(counter.forwards) == int((results[-1].cost.forwards + results[-1].cost.queries).sum())
        assert sum(counter.gradients) == int(results[-1].cost.backwards.sum())
    soon, usual, never = results
    assert torch.allclose(soon.x_adv, never.x_adv, atol=1e-9) and torch.allclose(usual.x_adv, never.x_adv, atol=1e-9)
    assert soon.cost.forwards.sum() <= usual.cost.forwards.sum() < never.cost.forwards.sum()
    assert 10 < int(soon.success.sum()) < 60 and (threat.distance(soon.x_adv, x) <= 0.1).all()
    labels = y.clone()
    labels[::2] = (labels[::2] + 1) % 10
    among = FABT(steps=10, targets=3)(victim, x, untargeted(labels), threat)
    assert torch.allclose(among.x_adv[1::2], never.x_adv[1::2], atol=1e-9)


def test_the_minimum_norm_search_spares_nobody_and_beats_the_first_success() -> None:
    x, y = digits()
    right = trained_network()(x).argmax(1) == y
    x, y, threat = x[right][:30], y[right][:30], ThreatModel("linf", 0.2)
    counter = Counter(trained_network())
    victim = system(counter, (1, 8, 8), 10)
    nearest = FABNorm(steps=10, targets=3)(victim, x, untargeted(y), threat)
    assert counter.forwards == [30] * (1 + 60 + 1) and nearest.cost.backwards.tolist() == [30] * 30
    first = FABT(steps=10, targets=3)(victim, x, untargeted(y), threat)
    both = first.success
    assert int(both.sum()) > 15 and torch.equal(nearest.success, both)
    assert (threat.distance(nearest.x_adv, x)[both] <= threat.distance(first.x_adv, x)[both]).all()
    assert threat.distance(nearest.x_adv, x).mean() < 0.9 * threat.distance(first.x_adv, x)[both].mean()


def test_on_a_view_that_is_not_exact_the_highest_margin_inside_the_ball_is_kept() -> None:
    x, y = digits()
    right = trained_network()(x).argmax(1) == y
    x, y, threat = x[right][:20], y[right][:20], ThreatModel("linf", 0.15)
    counter = Counter(trained_network())
    victim = Inexact(counter, input_shape=(1, 8, 8), num_classes=10)
    result = FABT(steps=5, targets=2)(victim, x, untargeted(y), threat)
    assert counter.forwards == [20] * (1 + 20 + 1) and counter.gradients == [20] * 10
    assert threat.contains(result.x_adv, x).all()
    with torch.no_grad():
        before, after = (margin(trained_network()(z), untargeted(y)) for z in (x, result.x_adv))
    assert (after >= before).all() and (after > before).float().mean() > 0.5
