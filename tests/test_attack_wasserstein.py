"""Pixel-mass Wasserstein: the projection against closed forms and a linear program, and its budget's checker."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from scipy.optimize import linprog
from scipy.special import lambertw
from torch import Tensor

from casemate.attacks.wasserstein import MassBudget, PixelMassWasserstein, Window, lambert, project
from casemate.errors import UserError
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel, targeted, untargeted

LINF = ThreatModel("linf", 0.1)
WINDOW = Window(5, 2.0)


def right_digits(n: int) -> tuple[Tensor, Tensor]:
    x, y = (part[1500:] for part in digits())
    right = trained_network()(x).argmax(1) == y
    return x[right][:n], y[right][:n]


def victim() -> TorchSystem:
    return system(trained_network(), (1, 8, 8), 10)


def transport_cost(x: np.ndarray, z: np.ndarray, window: Window) -> float:
    """Least cost of moving x to z (H x W, equal mass), by a linear program over all pairs within the window."""
    height, width = x.shape
    places = [(r, c) for r in range(height) for c in range(width)]
    reach = window.size // 2
    pairs = [
        (i, j) for i, (r, c) in enumerate(places) for j, (s, d) in enumerate(places)
        if max(abs(r - s), abs(c - d)) <= reach
    ]  # fmt: skip
    price = [((places[i][0] - places[j][0]) ** 2 + (places[i][1] - places[j][1]) ** 2) ** (window.power / 2)
             for i, j in pairs]  # fmt: skip
    kept = np.zeros((2 * len(places), len(pairs)))
    for k, (i, j) in enumerate(pairs):
        kept[i, k] = kept[len(places) + j, k] = 1
    total = z * (x.sum() / z.sum())
    found = linprog(price, A_eq=kept[:-1], b_eq=np.concatenate([x.ravel(), total.ravel()])[:-1])
    assert found.success
    return float(found.fun / x.sum())


# --- parts --------------------------------------------------------------------------------------------------------


def test_lambert_is_that_of_scipy() -> None:
    y = torch.linspace(-300, 300, 500, dtype=torch.float64)
    assert np.allclose(lambert(y).numpy(), lambertw(np.exp(y.numpy())).real, rtol=1e-12)
    for large in (-650.0, 1e3, 1e6):
        u = lambert(torch.tensor([large], dtype=torch.float64))
        assert float(u + u.log()) == pytest.approx(large, rel=1e-12)


def test_the_window_prices_distance_by_its_power() -> None:
    window = Window(3, 2.0)
    assert window.offsets() == [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    assert window.costs() == [2, 1, 2, 1, 1, 2, 1, 2]
    assert Window(3, 1.0).costs()[0] == pytest.approx(2**0.5)
    costs, masks = Window(5, 2.0).rings()
    assert costs.tolist() == [0, 1, 2, 4, 5, 8] and masks.flatten(1).sum(1).tolist() == [1, 4, 4, 4, 8, 4]


# --- projection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.02, 0.1, 0.5])
def test_two_pixels_are_projected_as_by_hand(radius: float) -> None:
    """(p, q) -> (p, q + s): the nearest point of equal mass moves s / 2, and the ball allows radius * (p + q)."""
    x = torch.tensor([[0.6, 0.2], [0.5, 0.1], [0.9, 0.05]]).view(3, 1, 1, 2)
    wanted = x + torch.tensor([0.0, 0.2]).view(1, 1, 1, 2)
    z, transport = project(x, wanted, radius, Window(3, 2.0), 300.0, 3000)
    moved = torch.full((3,), 0.1).minimum(radius * x.flatten(1).sum(1))
    assert torch.allclose(z.flatten(1), x.flatten(1) + torch.stack([-moved, moved], dim=1), atol=3e-3)
    assert MassBudget(radius, Window(3, 2.0)).contains(z, x, transport.plan(x, Window(3, 2.0))).all()


def test_projected_images_lie_in_the_ball_by_a_linear_program_and_nearer_than_the_clean_one() -> None:
    rng = torch.Generator().manual_seed(0)
    x = 0.2 + 0.5 * torch.rand(3, 1, 4, 4, generator=rng)
    wanted = x + 0.15 * torch.randn(x.shape, generator=rng).sign()
    for radius in (0.01, 0.05):
        z, transport = project(x, wanted, radius, WINDOW, 3000.0, 400)
        assert torch.allclose(z.sum((1, 2, 3)), x.sum((1, 2, 3)), atol=1e-4)
        costs = [
            transport_cost(a[0].double().numpy(), b[0].double().numpy(), WINDOW) for a, b in zip(x, z, strict=True)
        ]
        assert max(costs) <= radius * (1 + 1e-3) and min(costs) > 0.3 * radius
        assert ((z - wanted).flatten(1).norm(dim=1) < (x - wanted).flatten(1).norm(dim=1)).all()
        assert MassBudget(radius, WINDOW).contains(z, x, transport.plan(x, WINDOW)).all()


def test_a_larger_ball_comes_nearer_and_exactness_grows_with_the_weight() -> None:
    x = digits()[0][:4]
    wanted = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign()

    def left(radius: float, weight: float) -> Tensor:
        return (project(x, wanted, radius, WINDOW, weight, 400)[0] - wanted).flatten(1).norm(dim=1)

    assert (left(0.01, 1000.0) > left(0.05, 1000.0)).all() and (left(0.05, 1000.0) > left(0.2, 1000.0)).all()
    assert (left(0.05, 100.0) > left(0.05, 3000.0)).all()


def test_images_are_projected_each_on_its_own() -> None:
    x = digits()[0][:6]
    wanted = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).sign()
    together, _ = project(x, wanted, 0.05, WINDOW, 1000.0, 200)
    alone = torch.cat(
        [project(a[None], b[None], 0.05, WINDOW, 1000.0, 200)[0] for a, b in zip(x, wanted, strict=True)]
    )
    assert torch.allclose(together, alone, atol=1e-6)


# --- the budget ---------------------------------------------------------------------------------------------------


def moved_plan(x: Tensor, at: tuple[int, int], offset: tuple[int, int], mass: float, window: Window) -> Tensor:
    plan = x.new_zeros(len(x), x.shape[1], len(window.offsets()), *x.shape[2:])
    plan[:, 0, window.offsets().index(offset), at[0], at[1]] = mass
    return plan


def test_the_budget_catches_mass_that_comes_from_nowhere_or_costs_too_much() -> None:
    x = torch.full((1, 1, 4, 4), 0.25)  # mass 4
    z = x.clone()
    z[0, 0, 1, 1] -= 0.2
    z[0, 0, 2, 2] += 0.2  # cost 0.2 * 2 / 4 = 0.1
    plan = moved_plan(x, (1, 1), (1, 1), 0.2, WINDOW)
    assert MassBudget(0.1, WINDOW).contains(z, x, plan).all()
    assert not MassBudget(0.099, WINDOW).contains(z, x, plan).any()
    assert not MassBudget(0.1, WINDOW).contains(x, x, plan).any()  # another image than the plan's
    assert MassBudget(0.1, WINDOW).contains(x, x, torch.zeros_like(plan)).all()
    brighter = x.clone()
    brighter[0, 0, 2, 2] += 0.2
    assert not MassBudget(0.1, WINDOW).contains(brighter, x, torch.zeros_like(plan)).any()
    greedy = moved_plan(x, (1, 1), (0, 1), 0.3, WINDOW)  # more than the pixel has
    taken = x.clone()
    taken[0, 0, 1, 1], taken[0, 0, 1, 2] = -0.05, 0.55
    assert not MassBudget(1.0, WINDOW).contains(taken, x, greedy).any()
    assert not MassBudget(1.0, WINDOW).contains(taken.clamp(0, 1), x, greedy).any()
    negative = moved_plan(x, (1, 1), (0, 1), -0.1, WINDOW)
    back = x.clone()
    back[0, 0, 1, 1], back[0, 0, 1, 2] = 0.35, 0.15
    assert not MassBudget(1.0, WINDOW).contains(back, x, negative).any()
    off = moved_plan(x, (0, 0), (-1, 0), 0.1, WINDOW)  # beyond the edge
    lost = x.clone()
    lost[0, 0, 0, 0] -= 0.1
    assert not MassBudget(1.0, WINDOW).contains(lost, x, off).any()
    assert str(MassBudget(0.1, WINDOW)) == "pixel mass 0.1"


def test_mass_above_white_is_cut() -> None:
    x = torch.tensor([0.9, 0.9]).view(1, 1, 1, 2)
    plan = moved_plan(x, (0, 0), (0, 1), 0.2, WINDOW)
    z = torch.tensor([0.7, 1.0]).view(1, 1, 1, 2)
    assert MassBudget(0.2, WINDOW).contains(z, x, plan).all()
    assert not MassBudget(0.2, WINDOW).contains(torch.tensor([0.7, 1.1]).view(1, 1, 1, 2), x, plan).any()


# --- the attack ---------------------------------------------------------------------------------------------------


def test_on_two_pixels_the_attack_succeeds_exactly_where_the_mass_can_be_moved() -> None:
    """Class 1 where the right pixel exceeds .3. What it lacks must come from its neighbour at cost 1."""
    made = linear_system(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0.3, 0.0]), (1, 1, 2))
    lack = torch.linspace(0.01, 0.12, 12)
    x = torch.stack([torch.full_like(lack, 0.6), 0.3 - lack], dim=1).view(12, 1, 1, 2)
    attack = PixelMassWasserstein(
        radius=0.08, first=0.01, every=2, steps=60, window=3, regularisation=300.0, step_size=0.2, sinkhorn_steps=60
    )
    result = attack(made, x, untargeted(torch.zeros(12, dtype=torch.long)), LINF)
    allowed = 0.08 * (0.9 - lack)
    clear = (lack / allowed - 1).abs() > 0.05
    assert torch.equal(result.success[clear], (lack < allowed)[clear]) and 3 < int(result.success.sum()) < 9


def test_the_ball_grows_until_it_is_full() -> None:
    attack = PixelMassWasserstein(radius=0.1)
    assert [attack.ball(t) for t in (0, 9, 10, 20, 10_000)] == pytest.approx([0.001, 0.001, 0.00117, 0.0013689, 0.1])


def test_it_fells_digits_inside_its_ball_and_more_in_a_larger_one() -> None:
    x, y = right_digits(30)
    options = {"steps": 12, "first": 0.02, "growth": 1.5, "every": 2, "regularisation": 1000.0, "sinkhorn_steps": 60}
    fallen = []
    for radius in (0.03, 0.3):
        result = PixelMassWasserstein(radius=radius, **options)(victim(), x, untargeted(y), LINF)
        assert torch.equal(result.success, result.prediction != y)
        fallen.append(int(result.success.sum()))
    assert fallen[0] < fallen[1] and fallen[1] > 8
    aimed = PixelMassWasserstein(radius=0.3, **options)(victim(), x[:10], targeted(y[:10], (y[:10] + 1) % 10), LINF)
    assert aimed.success.any()


def test_it_costs_a_pass_per_step_and_fallen_images_leave() -> None:
    x, y = right_digits(10)
    counter = Counter(trained_network())
    made = system(counter, (1, 8, 8), 10)
    attack = PixelMassWasserstein(steps=3, first=1e-5, radius=1e-5, sinkhorn_steps=20)
    result = attack(made, x, untargeted(y), LINF)
    assert counter.forwards == [10] * 4 and counter.gradients == [10] * 3
    assert result.cost.forwards.tolist() == [4] * 10 and result.cost.backwards.tolist() == [3] * 10
    assert attack.passes(made.views()["adaptive"], 10) == (30, 30, 0)
    counter.forwards.clear()
    labels = torch.where(torch.arange(10) < 6, (y + 1) % 10, y)
    among = attack(made, x, untargeted(labels), LINF)
    assert counter.forwards == [10, 4, 4, 10] and among.cost.forwards.tolist() == [2] * 6 + [4] * 4
    assert torch.equal(among.x_adv[:6], x[:6]) and torch.allclose(among.x_adv[6:], result.x_adv[6:], atol=1e-6)


class Inexact(TorchSystem):
    def views(self) -> dict[str, View]:
        return {name: View(name, self.classifier, False, self.offers) for name in ("static", "adaptive")}


def test_on_a_view_that_is_not_exact_the_best_is_kept() -> None:
    x, y = right_digits(6)
    blind = Inexact(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    attack = PixelMassWasserstein(steps=4, first=0.05, sinkhorn_steps=30)
    result = attack(blind, x, untargeted(y), LINF)
    assert result.cost.queries.tolist() == [1] * 6 and attack.passes(blind.views()["static"], 6) == (24, 24, 6)
    assert not torch.equal(result.x_adv, x)


def test_black_images_have_no_mass_and_stay() -> None:
    x, _ = right_digits(3)
    x = torch.cat([torch.zeros(1, 1, 8, 8), x])
    attack = PixelMassWasserstein(steps=2, first=0.05, sinkhorn_steps=20)
    result = attack(victim(), x, untargeted(victim().decide(x)), LINF)
    assert torch.equal(result.x_adv[0], x[0]) and not result.success[0] and result.x_adv.isfinite().all()
    assert result.cost.forwards.tolist()[0] == 1
    alone = attack(victim(), x[1:2], untargeted(victim().decide(x[1:2])), LINF)
    assert torch.allclose(alone.x_adv, result.x_adv[1:2], atol=1e-6)


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match="window must be odd and at least 3, and is 4"):
        PixelMassWasserstein(window=4)
    with pytest.raises(UserError, match=r"growth must be at least 1, and is 0\.5"):
        PixelMassWasserstein(growth=0.5)
