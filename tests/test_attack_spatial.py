"""stAdv, ADef and the warping below them, against flows worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.gradient import PGD
from casemate.attacks.spatial import ADef, StAdv, blur, roughness
from casemate.attacks.warping import FlowBudget, displacement, limited, warp
from casemate.errors import UserError
from casemate.objectives import margin
from casemate.system import TorchSystem, View
from casemate.threat import Goal, ThreatModel, targeted, untargeted

LINF = ThreatModel("linf", 0.1)
QUICK: dict[str, Any] = {"steps": 60, "rate": 0.03, "restarts": 1}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def right_digits(n: int) -> tuple[Tensor, Tensor]:
    """Digits of the held-out part that the trained network gets right."""
    x, y = (part[1500:] for part in digits())
    right = trained_network()(x).argmax(1) == y
    return x[right][:n], y[right][:n]


def victim() -> TorchSystem:
    return system(trained_network(), (1, 8, 8), 10)


# --- warping ------------------------------------------------------------------------------------------------------


def test_a_zero_flow_changes_nothing_and_a_whole_one_shifts() -> None:
    x = digits()[0][:5]
    flow = torch.zeros(5, 2, 8, 8)
    assert torch.equal(warp(x, flow), x)
    flow[:, 0], flow[:, 1] = 2, -1  # each pixel from two to the right and one above
    assert torch.equal(warp(x, flow)[:, :, 1:, :6], x[:, :, :-1, 2:])
    assert torch.equal(warp(x, flow)[:, :, 1:, 6], x[:, :, :-1, 7])  # beyond the edge, the edge


def test_warping_is_bilinear_and_its_slope_is_that_of_the_image() -> None:
    x = torch.tensor([[0.1, 0.5], [0.2, 0.9]]).view(1, 1, 2, 2)
    flow = torch.zeros(1, 2, 2, 2)
    flow[0, :, 0, 0] = torch.tensor([0.25, 0.5])
    expected = 0.75 * 0.5 * 0.1 + 0.25 * 0.5 * 0.5 + 0.75 * 0.5 * 0.2 + 0.25 * 0.5 * 0.9
    assert warp(x, flow)[0, 0, 0, 0] == pytest.approx(expected)
    assert torch.equal(warp(x, flow).flatten()[1:], x.flatten()[1:])
    image, flow = torch.rand(2, 3, 5, 4, dtype=torch.float64), noise(2, 2, 5, 4).double()
    assert torch.autograd.gradcheck(lambda f: warp(image, f), flow.requires_grad_())


def test_a_resting_flow_has_a_slope_at_every_edge() -> None:
    """Clipped coordinates have none beyond the edge; at rest, pixels of the edge must still feel the way inward."""
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4) / 4
    flow = torch.zeros(1, 2, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(warp(x, flow).sum(), flow)
    assert torch.equal(gradient[0, 0], torch.full((4, 4), 0.25)) and not gradient[0, 1].any()


@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 6, 1), (1, 1, 1)])
def test_images_of_one_row_or_column_are_warped_too(shape: tuple[int, int, int]) -> None:
    x = torch.rand(2, *shape)
    flow = noise(2, 2, *shape[1:])
    assert FlowBudget("flow").contains(warp(x, flow), x, flow).all()
    for attack in (StAdv(steps=3), ADef(steps=3)):
        flat = linear_system(noise(3, x[0].numel()), shape=shape)
        assert attack(flat, x, untargeted(flat.decide(x)), LINF).x_adv.shape == x.shape


def test_roughness_of_a_constant_flow_is_that_of_its_smoothing_constant_alone() -> None:
    constant = torch.full((2, 2, 6, 9), 0.7)
    assert roughness(constant) == pytest.approx(torch.full((2,), 4 * 6 * 9 * 1e-4))
    assert roughness(constant, "diagonal") == pytest.approx(roughness(constant))


def test_roughness_counts_each_neighbour_once_from_either_side() -> None:
    flow = torch.zeros(1, 2, 5, 5)
    flow[0, :, 2, 2] = torch.tensor([3.0, 4.0])  # length 5, four neighbours
    rest = (4 * 25 - 8) * 1e-4
    assert float(roughness(flow)) == pytest.approx(8 * 5 + rest, rel=1e-5)
    assert float(roughness(flow, "diagonal")) == pytest.approx(8 * 5 + rest, rel=1e-5)
    flow[0, :, 2, 3] = flow[0, :, 2, 2]  # beside it: six neighbours that differ, or eight diagonal ones
    assert float(roughness(flow)) == pytest.approx(12 * 5 + (4 * 25 - 12) * 1e-4, rel=1e-5)
    assert float(roughness(flow, "diagonal")) == pytest.approx(16 * 5 + (4 * 25 - 16) * 1e-4, rel=1e-5)


def test_blurring_is_symmetric_and_keeps_a_constant_away_from_the_edges() -> None:
    a, b = noise(1, 2, 12, 12, seed=1), noise(1, 2, 12, 12, seed=2)
    assert float((a * blur(b, 1.5)).sum()) == pytest.approx(float((blur(a, 1.5) * b).sum()), rel=1e-4)
    assert torch.allclose(blur(torch.ones(1, 2, 12, 12), 1.0)[..., 4:8, 4:8], torch.ones(1), atol=1e-3)
    assert torch.equal(blur(a, 0), a)
    peak = torch.zeros(1, 2, 9, 9)
    peak[0, 0, 4, 4] = 1
    bell = blur(peak, 1.0)[0, 0, 4] / blur(peak, 1.0)[0, 0, 4, 4]
    assert (
        bell[5] == pytest.approx(torch.exp(torch.tensor(-0.5)).item(), rel=1e-4) and not blur(peak, 1.0)[0, 1].any()
    )


# --- budgets ------------------------------------------------------------------------------------------------------


def test_the_flow_budget_catches_images_that_are_no_such_warp() -> None:
    x, flow = digits()[0][:6].clone(), limited(noise(6, 2, 8, 8), 1.0)
    x_adv, budget = warp(x, flow), FlowBudget("flow", 1.0)
    assert budget.contains(x_adv, x, flow).all() and budget.contains(x_adv, x).all()
    broken, bent = x_adv.clone(), flow.clone()
    broken[1, 0, 3, 3] += 0.001
    broken[2, 0, 0, 0] = torch.nan
    bent[3] = 0  # another flow than the image's
    assert budget.contains(broken, x, bent).tolist() == [True, False, False, False, True, True]
    beyond = FlowBudget("flow", 0.9).contains(x_adv, x, flow)
    assert torch.equal(beyond, displacement(flow) <= 0.9) and not beyond.all()


def test_from_the_images_alone_the_flow_budget_catches_values_that_nothing_within_reach_has() -> None:
    x = torch.zeros(3, 1, 8, 8)
    x[:, :, :, 6:] = 0.8
    moved = x.clone()
    moved[1, 0, 4, 3] = 0.5  # three pixels from the bright part
    moved[2, 0, 4, 5] = 0.5
    assert FlowBudget("flow", 2.0).contains(moved, x).tolist() == [True, False, True]
    assert FlowBudget("flow", 2.5).contains(moved, x).all() and FlowBudget("flow").contains(moved, x).all()
    moved[2, 0, 4, 5] = 0.9
    assert FlowBudget("flow").contains(moved, x).tolist() == [True, True, False]


class Cheat(Attack):
    """Warps, and says something else."""

    def __init__(self, how: Literal["image", "flow", "nothing"]) -> None:
        self.how = how

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        flow = noise(len(x), 2, *x.shape[2:])
        x_adv = warp(x, flow)
        if self.how == "image":
            x_adv[2, 0, 3, 3] = (x_adv[2, 0, 3, 3] + 0.5) % 1
        if self.how == "flow":
            flow[2] *= 0.9
        return Shown(x_adv, flow)

    def budget(self, threat: ThreatModel) -> FlowBudget:
        return FlowBudget("flow")


@pytest.mark.parametrize("how", ["image", "flow", "nothing"])
def test_leaving_a_flow_budget_is_caught_and_the_image_named(how: Any) -> None:
    x, y = (part[:4] for part in digits())
    if how != "nothing":
        with pytest.raises(AssertionError, match="Cheat left its budget at image 2"):
            Cheat(how)(victim(), x, untargeted(y), LINF)
        return
    result = Cheat(how)(victim(), x, untargeted(y), LINF, clean=torch.tensor([y[0], y[1] + 1, y[2], y[3]]) % 10)
    assert torch.equal(result.x_adv[1], x[1]) and not result.witness[1].any() and result.witness[0].any()  # type: ignore[index]


def test_budgets_say_what_they_are() -> None:
    assert str(StAdv().budget(LINF)) == "flow tau 0.05"
    assert str(StAdv(tau=0.5, max_displacement=1.5).budget(LINF)) == "flow tau 0.5, at most 1.5 px"
    assert str(ADef().budget(LINF)) == "deformation" and ADef().budget(LINF).radius is None
    assert str(ADef(max_displacement=5).budget(LINF)) == "deformation, at most 5 px"


# --- ramps: a linear classifier whose score a shift changes by a known amount ---------------------------------------


def ramps(n: int = 9) -> tuple[TorchSystem, Counter, Tensor, Goal, Tensor]:
    """Images .1 u + b_i, and a score that sums the 6 x 6 inner pixels: a shift of t pixels to the right adds 3.6 t.
    Returns the shift that each image needs."""
    weight = torch.zeros(2, 1, 8, 8)
    weight[1, :, 1:-1, 1:-1] = 1
    level = torch.linspace(0.0, 0.09, n)
    x = 0.1 * torch.arange(8.0).expand(n, 1, 8, 8) + level.view(-1, 1, 1, 1)
    needed = 1.0 - level / 0.1  # the boundary is where the level would be .1
    bias = torch.tensor([36 * 0.1 + float(0.1 * torch.arange(1.0, 7.0).sum()) * 6, 0.0])
    counter = Counter(linear_system(weight.flatten(1), bias, (1, 8, 8)).classifier)
    return system(counter, (1, 8, 8), 2), counter, x, untargeted(torch.zeros(n, dtype=torch.long)), needed


def test_adef_finds_the_shift_that_a_ramp_needs_in_one_step() -> None:
    made, counter, x, goal, needed = ramps()
    result = ADef(sigma=0.0, overshoot=1.05)(made, x, goal, LINF)
    assert result.success.all() and result.witness is not None
    inner = result.witness[:, 0, 1:-1, 1:-1]
    assert torch.allclose(inner, 1.05 * needed.view(-1, 1, 1).expand(-1, 6, 6), atol=1e-4)
    assert not result.witness[:, 1].any() and torch.count_nonzero(result.witness[:, 0]) == 9 * 36
    assert counter.forwards == [9, 9, 9] and counter.gradients == [9]  # before, after, verification
    assert result.cost.forwards.tolist() == [3] * 9 and result.cost.backwards.tolist() == [1] * 9


def test_a_smoothed_adef_step_reaches_the_boundary_too() -> None:
    """The step's length is exact for a linear score, whatever the smoothing: the score is just crossed."""
    made, counter, x, goal, _ = ramps()
    view = made.views()["adaptive"]
    for sigma in (0.5, 1.0):
        result = ADef(sigma=sigma, overshoot=1.001, steps=3)(made, x[-4:], goal[torch.arange(4)], LINF)
        assert result.success.all() and counter.forwards[:2] == [4, 4]
        crossed = margin(view.logits(result.x_adv), goal[torch.arange(4)])
        assert (crossed < 0.01).all()  # clean it was at most -1.6
        counter.forwards.clear()


@pytest.mark.parametrize("optimizer", ["adef", "adam", "lbfgs"])
def test_with_a_longest_way_an_attack_succeeds_exactly_where_the_shift_fits(optimizer: Any) -> None:
    made, _, x, goal, needed = ramps()
    attack: Attack = ADef(sigma=0.0, max_displacement=0.6, steps=10)
    if optimizer != "adef":
        attack = StAdv(optimizer=optimizer, tau=0.0, steps=80, rate=0.02, max_displacement=0.6)
    result = attack(made, x, goal, LINF)
    clear = (needed - 0.6).abs() > 0.01
    assert torch.equal(result.success[clear], (needed < 0.6)[clear]) and 2 < int(result.success.sum()) < 8
    assert result.witness is not None and (displacement(result.witness) <= 0.6 * (1 + 1e-6)).all()


def test_stadv_does_not_rest_where_the_score_is_just_crossed() -> None:
    made, _, x, goal, _ = ramps()
    view = made.views()["adaptive"]
    result = StAdv(tau=0.0, kappa=0.5, steps=100, rate=0.02, keep="smoothest")(made, x, goal, LINF)
    assert result.success.all()
    first = StAdv(tau=0.0, kappa=0.5, steps=100, rate=0.02, keep="first")(made, x, goal, LINF)
    assert (margin(view.logits(first.x_adv), goal) < 0.2).all()  # one step beyond, and stopped


# --- on a network -------------------------------------------------------------------------------------------------


def test_stadv_by_either_optimizer_fells_digits_that_stand_and_keeps_its_flow() -> None:
    x, y = right_digits(40)
    for attack in (StAdv(**QUICK), StAdv(optimizer="lbfgs", steps=60)):
        result = attack(victim(), x, untargeted(y), LINF)
        assert int(result.success.sum()) > 10 and result.witness is not None
        assert torch.equal(result.x_adv[result.success], warp(x, result.witness)[result.success])
        assert torch.equal(result.success, victim().decide(result.x_adv) != y)


def test_a_larger_tau_is_smoother_and_weaker() -> None:
    x, y = right_digits(40)
    fallen, rough = [], []
    for tau in (0.01, 0.1, 1.0):
        result = StAdv(tau=tau, **QUICK)(victim(), x, untargeted(y), LINF)
        assert result.witness is not None
        fallen.append(int(result.success.sum()))
        rough.append(float(roughness(result.witness).mean()))
    assert fallen[0] >= fallen[1] > fallen[2] and rough[0] > rough[1] > rough[2]


def test_the_smoothest_success_is_kept_and_the_first_one_is_cheaper() -> None:
    x, y = right_digits(40)
    smoothest, first = (StAdv(keep=k, **QUICK)(victim(), x, untargeted(y), LINF) for k in ("smoothest", "first"))
    fell = smoothest.success
    assert torch.equal(fell, first.success) and fell.sum() > 10
    assert smoothest.witness is not None and first.witness is not None
    rough, at_once = roughness(smoothest.witness)[fell], roughness(first.witness)[fell]
    assert (rough <= at_once).all() and rough.sum() < at_once.sum()
    assert (first.cost.forwards[fell] < 61).all() and (smoothest.cost.forwards == 61).all()


def test_adef_fells_digits_with_small_deformations() -> None:
    x, y = right_digits(60)
    free = ADef()(victim(), x, untargeted(y), LINF)
    assert free.success.float().mean() > 0.9 and free.witness is not None
    assert float(displacement(free.witness).median()) < 2
    near = ADef(max_displacement=0.5)(victim(), x, untargeted(y), LINF)
    assert 0 < int(near.success.sum()) < int(free.success.sum())
    one = ADef(candidates=1)(victim(), x, untargeted(y), LINF)
    assert one.cost.backwards.sum() < free.cost.backwards.sum()


def test_the_size_of_a_deformation_can_be_its_length_or_its_longest_vector() -> None:
    x, y = right_digits(60)
    by_max, by_l2 = (ADef(smallest=s)(victim(), x, untargeted(y), LINF).witness for s in ("max", "l2"))
    assert by_max is not None and by_l2 is not None and not torch.equal(by_max, by_l2)
    assert by_l2.flatten(1).norm(dim=1).mean() < by_max.flatten(1).norm(dim=1).mean()


@pytest.mark.parametrize("attack", [StAdv(steps=100, rate=0.05, tau=0.01), ADef()], ids=lambda a: type(a).__name__)
def test_targets_are_reached(attack: Attack) -> None:
    x, y = right_digits(30)
    goal = targeted(y, (y + 1) % 10)
    result = attack(victim(), x, goal, LINF)
    assert int(result.success.sum()) > 5
    assert torch.equal(result.prediction[result.success], ((y + 1) % 10)[result.success])


# --- passes, and what a result depends on -------------------------------------------------------------------------

STILL = {"max_displacement": 1e-5}
ATTACKS: list[Attack] = [StAdv(**QUICK), StAdv(optimizer="lbfgs", steps=15), ADef(steps=8, candidates=3)]
NAMES = ["adam", "lbfgs", "adef"]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_stadv_costs_a_forward_and_a_gradient_per_step(optimizer: Any) -> None:
    x, y = right_digits(8)
    counter = Counter(trained_network())
    attack = StAdv(optimizer=optimizer, steps=7, restarts=1, **STILL)
    result = attack(system(counter, (1, 8, 8), 10), x, untargeted(y), LINF)
    assert not result.success.any()
    assert counter.forwards == [8] * 8 and counter.gradients == [8] * 7
    assert result.cost.forwards.tolist() == [8] * 8 and result.cost.backwards.tolist() == [7] * 8
    assert attack.passes(victim().views()["adaptive"], 8) == (56, 56, 0)


def test_restarts_are_made_on_survivors_from_another_flow() -> None:
    x, y = right_digits(40)
    counter = Counter(trained_network())
    options: dict[str, Any] = {"steps": 10, "rate": 0.01, "tau": 0.1}
    once = StAdv(restarts=1, **options)(victim(), x, untargeted(y), LINF)
    twice = StAdv(restarts=2, **options)(system(counter, (1, 8, 8), 10), x, untargeted(y), LINF)
    survivors = int((~once.success).sum())
    assert 0 < survivors < 40 and counter.forwards == [40] * 10 + [survivors] * 10 + [40]
    assert torch.equal(twice.x_adv[once.success], once.x_adv[once.success])
    assert int(twice.success.sum()) > int(once.success.sum())
    assert twice.cost.forwards.tolist() == [11 if fell else 21 for fell in once.success]
    assert StAdv(restarts=2, **options).passes(victim().views()["adaptive"], 40) == (800, 800, 0)


def test_adef_costs_a_gradient_per_candidate() -> None:
    x, y = right_digits(8)
    counter = Counter(trained_network())
    attack = ADef(steps=4, candidates=5, **STILL)
    result = attack(system(counter, (1, 8, 8), 10), x, untargeted(y), LINF)
    assert not result.success.any()
    assert counter.forwards == [8] * 5 and counter.gradients == [8] * 20
    assert result.cost.forwards.tolist() == [5] * 8 and result.cost.backwards.tolist() == [20] * 8
    assert attack.passes(victim().views()["adaptive"], 8) == (32, 160, 0)


def test_fallen_images_leave_adef() -> None:
    x, y = right_digits(40)
    counter = Counter(trained_network())
    result = ADef(candidates=2, sigma=0.3, overshoot=1.01)(system(counter, (1, 8, 8), 10), x, untargeted(y), LINF)
    assert counter.forwards[0] == 40 and counter.forwards[-2] < 20
    assert counter.forwards[:-1] == sorted(counter.forwards[:-1], reverse=True)
    assert sum(counter.forwards) == int(result.cost.forwards.sum())
    assert sum(counter.gradients) == int(result.cost.backwards.sum())


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_an_image_that_is_wrong_at_once_stays_as_it_is(attack: Attack) -> None:
    x, y = right_digits(10)
    goal = untargeted(torch.where(torch.arange(10) < 4, (y + 1) % 10, y))
    result = attack(victim(), x, goal, LINF)
    assert torch.equal(result.x_adv[:4], x[:4]) and result.success[:4].all()
    assert result.witness is not None and not result.witness[:4].any()


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_an_image_does_not_feel_what_becomes_of_the_others(attack: Attack) -> None:
    x, y = right_digits(20)
    alone = attack(victim(), x, untargeted(y), LINF, seed=3)
    labels = torch.where(torch.arange(20) % 2 == 0, (y + 1) % 10, y)  # half of the chunk is wrong from the start
    among = attack(victim(), x, untargeted(labels), LINF, seed=3)
    assert torch.allclose(alone.x_adv[1::2], among.x_adv[1::2], atol=2e-3)
    assert torch.equal(alone.success[1::2], among.success[1::2])


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_one_image_alone_fares_as_in_a_batch(attack: Attack) -> None:
    x, y = right_digits(6)
    if isinstance(attack, StAdv):  # rounding grows with every step, and a start is drawn for the whole batch
        attack = replace(attack, restarts=1, steps=15)
    batch = attack(victim(), x, untargeted(y), LINF)
    for i in (0, 5):
        alone = attack(victim(), x[i : i + 1], untargeted(y[i : i + 1]), LINF)
        assert torch.allclose(alone.x_adv, batch.x_adv[i : i + 1], atol=2e-3)


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_flat_images_cannot_be_deformed_and_say_so(attack: Attack) -> None:
    x = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.full((1, 8, 8), 0.4)])
    goal = untargeted(victim().decide(x))
    result = attack(victim(), x, goal, LINF)
    assert not result.success.any() and torch.allclose(result.x_adv, x) and result.x_adv.isfinite().all()
    if isinstance(attack, ADef):
        assert result.cost.forwards.tolist() == [2] * 3  # one look finds no slope


class Inexact(TorchSystem):
    def views(self) -> dict[str, View]:
        return {name: View(name, self.classifier, False, self.offers) for name in ("static", "adaptive")}


@pytest.mark.parametrize("attack", ATTACKS, ids=NAMES)
def test_on_a_view_that_is_not_exact_the_highest_margin_is_kept(attack: Attack) -> None:
    x, y = right_digits(12)
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = trained_network()(x)
            seen.append(out.detach())
            return out

    blind = Inexact(Watched(), input_shape=(1, 8, 8), num_classes=10)
    result = attack(blind, x, untargeted(y), LINF)
    kept = margin(trained_network()(result.x_adv), untargeted(y))
    whole = [margin(z, untargeted(y)) for z in seen[:-1] if len(z) == 12]
    assert torch.allclose(kept, torch.stack(whole).amax(0), atol=1e-4) or isinstance(attack, ADef)
    assert (kept >= torch.stack(whole).amax(0) - 1e-4).all()
    looked = result.cost.queries.sum()
    assert looked == (sum(len(z) for z in seen[:-1]) - int(result.cost.forwards.sum()) + 12)


def test_seeds_decide_where_a_flow_starts_and_the_global_one_is_left_alone() -> None:
    x, y = right_digits(6)
    state = torch.get_rng_state()
    attack = StAdv(steps=5, restarts=2, kappa=9.0)
    one, again, other = (attack(victim(), x, untargeted(y), LINF, s).x_adv for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_flow_need_not_stay_in_any_ball() -> None:
    x, y = right_digits(20)
    result = ADef()(victim(), x, untargeted(y), ThreatModel("linf", 0.01))
    assert result.success.any() and not ThreatModel("linf", 0.01).contains(result.x_adv, x).all()
    with pytest.raises(AssertionError, match="left its budget"):
        Beyond()(victim(), x, untargeted(y), ThreatModel("linf", 0.01))


class Beyond(PGD):
    """A ball's attack that leaves it: the base class must not have become lax."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return (x + 0.02).clamp(0, 1)


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match=r"ADef: overshoot must be at least 1, and is 0\.9"):
        ADef(overshoot=0.9)
