"""The internal Wasserstein distance against brute force, an LP and what is known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from torch import Tensor

from casemate.errors import UserError
from casemate.iwd import PROTOCOLS, Windows, bounds, measure
from casemate.iwd.exact import assign, transport
from casemate.iwd.sinkhorn import rounded, sinkhorn
from casemate.iwd.sliced import directions, sliced


def picture(seed: int, n: int = 1, side: int = 12, channels: int = 3) -> Tensor:
    """Smooth images, as neighbouring patches of natural ones are alike: noise at a third of the size, enlarged."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, side // 3, side // 3, generator=rng)
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)


def changed(x: Tensor, by: str) -> Tensor:
    rng = torch.Generator().manual_seed(99)
    return {
        "noise": lambda: (x + 8 / 255 * torch.randn(x.shape, generator=rng).sign()).clamp(0, 1),
        "shift": lambda: x.roll(2, dims=3),
        "flip": lambda: x.flip(3),
        "other": lambda: picture(7, len(x), x.shape[-1], x.shape[1]),
        "brighter": lambda: (x + 0.05).clamp(0, 1),
    }[by]()


def points(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((n, d))


# --- patches ------------------------------------------------------------------------------------------------


def test_patches_are_cut_row_by_row_and_flattened_by_channel() -> None:
    x = torch.arange(2 * 1 * 3 * 4).float().view(2, 1, 3, 4)
    made = Windows(size=2, stride=2).patches(x)
    assert made.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]], [[12, 13, 16, 17], [14, 15, 18, 19]]]
    colours = picture(0, 2)
    expected = torch.nn.functional.unfold(colours, 5, stride=3).transpose(1, 2)
    assert torch.equal(Windows(size=5, stride=3).patches(colours), expected)


def test_drawn_windows_are_shared_or_independent_and_depend_on_the_seed() -> None:
    shared = Windows(size=3, count=20)
    places = shared.places(12, 12)
    assert len(places) == len(set(places.tolist())) == 20 and places.max() < 100
    assert torch.equal(places, shared.places(12, 12))
    assert not torch.equal(places, Windows(size=3, count=20, seed=1).places(12, 12))
    assert not torch.equal(places, shared.places(12, 12, draw=1))
    assert torch.equal(Windows(size=3, count=100).places(12, 12), torch.arange(100))
    x = picture(0)
    assert torch.equal(shared.patches(x)[0], Windows(size=3).patches(x)[0, places])


def test_windows_that_cannot_be() -> None:
    with pytest.raises(UserError, match="windows of 13x13 do not fit into images of 12x12"):
        measure(picture(0), picture(1), Windows(size=13))
    with pytest.raises(UserError, match="cannot be reduced to a shorter side of 20"):
        measure(picture(0), picture(1), Windows(size=3, scale=20))
    with pytest.raises(UserError, match="needs a count"):
        Windows(sampling="independent")
    with pytest.raises(UserError, match=r"100 patches an image .* raise the limit of 99"):
        measure(picture(0), picture(1), Windows(size=3), limit=99)
    with pytest.raises(UserError, match="N x C x H x W twice"):
        measure(picture(0), picture(1, n=2), Windows(size=3))
    with pytest.raises(UserError, match="not finite"):
        measure(picture(0), picture(1) / 0, Windows(size=3))


# --- the exact value ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_six_patches_against_all_720_pairings(seed: int) -> None:
    u, v = points(6, 4, seed), points(6, 4, seed + 50)
    best = min(np.abs(u - v[list(p)]).sum(1).mean() for p in itertools.permutations(range(6)))
    assert transport(u, v)[0] * 4 == pytest.approx(best, rel=1e-12)


def test_twenty_patches_against_the_linear_program() -> None:
    """A pairing is as good as any coupling."""
    u, v = points(20, 3, 0), points(20, 3, 1)
    cost = cdist(u, v, "cityblock")
    marginals = np.concatenate([np.kron(np.eye(20), np.ones(20)), np.kron(np.ones(20), np.eye(20))])
    solved = linprog(cost.ravel(), A_eq=marginals, b_eq=np.full(40, 1 / 20), method="highs")
    assert transport(u, v)[0] * 3 == pytest.approx(solved.fun, rel=1e-9)


@pytest.mark.parametrize("by", ["noise", "shift", "flip", "other"])
def test_the_quick_solution_is_the_plain_one(by: str) -> None:
    """Whichever of the three ways `assign` takes."""
    x = picture(0, side=15)
    u, v = (Windows(size=3).patches(image)[0].double().numpy() for image in (x, changed(x, by)))
    cost = cdist(u, v, "cityblock")
    before = cost.copy()
    pairing = assign(cost, u, v, bounds.marginal(u, v))
    assert sorted(pairing.tolist()) == list(range(len(u))) and np.array_equal(cost, before)
    best = cost[linear_sum_assignment(cost)].mean()
    assert cost[np.arange(len(u)), pairing].mean() == pytest.approx(best, rel=1e-12)


def test_identity_symmetry_and_triangle() -> None:
    x, y, z = picture(0), picture(1), changed(picture(0), "flip")
    windows = Windows(size=5)
    assert measure(x, x, windows).value.tolist() == [0.0]
    there, back = measure(x, y, windows).value[0], measure(y, x, windows).value[0]
    assert there == pytest.approx(back, rel=1e-12) and there > 0
    assert there <= measure(x, z, windows).value[0] + measure(z, y, windows).value[0] + 1e-12


def test_a_shuffled_list_of_patches_is_at_no_distance() -> None:
    u = points(50, 6, 0)
    assert transport(u, u[np.random.default_rng(1).permutation(50)])[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_change_of_brightness_is_its_own_distance(size: int) -> None:
    """Both bounds meet there, so that nothing need be solved; half the range keeps clear of clipping."""
    x = picture(0) / 2
    found = measure(x.double(), x.double() + 0.125, Windows(size=size))
    for value in (found.value, found.lower, found.upper):
        assert value[0] == pytest.approx(0.125, rel=1e-12)


def test_a_known_value_by_hand() -> None:
    """1x1 windows see only the grey levels: {0, 1, .5, .5} and {.5, 0, 0, 1} are 0 + 0 + 0 + .5 apart in order."""
    x = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    y = torch.tensor([[[[0.5, 0.0], [0.0, 1.0]]]])
    found = measure(x, y, Windows(size=1))
    assert (found.value[0], found.lower[0], found.upper[0]) == pytest.approx((0.125, 0.125, 0.625))
    assert (found.count, found.dimension, found.shape) == (4, 1, (1, 2, 2)) and found.floor is None


def test_a_batch_is_measured_pair_by_pair_and_says_how() -> None:
    x = picture(0, n=3)
    y = torch.cat([changed(x[:1], "noise"), x[1:2], changed(x[2:], "flip")])
    windows = Windows(size=5, stride=2)
    both = measure(x, y, windows)
    assert both.value.tolist() == [measure(x[i : i + 1], y[i : i + 1], windows).value[0] for i in range(3)]
    assert both.value[1] == 0 and both.count == 16 and both.dimension == 75
    assert both.about() == {
        "method": "exact", "size": 5, "stride": 2, "scale": None, "sampling": "shared", "count": 16,
        "sampled": False, "seed": 0, "shape": [3, 12, 12],
    }  # fmt: skip


def test_an_independent_draw_has_a_floor_and_a_shared_one_has_none() -> None:
    """Sign noise at shared places costs what it is (identity pairing is best); drawn apart it drowns in the floor."""
    x = picture(0, side=24) / 2 + 0.25
    noisy = changed(x, "noise")
    shared = measure(x, noisy, Windows(size=7, count=60))
    assert shared.floor is None and shared.upper[0] == pytest.approx(8 / 255, rel=1e-4)
    apart = measure(x, noisy, Windows(size=7, count=60, sampling="independent"))
    assert apart.floor is not None and apart.floor[0] > 0.01
    assert apart.excess[0] == apart.value[0] - apart.floor[0] < apart.value[0]
    same = measure(x, x, Windows(size=7, count=60, sampling="independent"))
    assert same.value[0] == same.floor[0] and same.excess[0] == 0  # type: ignore[index]


def test_scale_brings_noise_nearer_and_a_flip_no_nearer() -> None:
    x = picture(0, side=24)
    noise, flip = changed(x, "noise"), changed(x, "flip")
    fine, coarse = Windows(size=7), Windows(size=7, scale=12)
    assert measure(x, noise, coarse).value[0] < 0.5 * measure(x, noise, fine).value[0]
    assert measure(x, flip, coarse).value[0] > 0.8 * measure(x, flip, fine).value[0]
    assert measure(x, flip, coarse).shape == (3, 12, 12)
    assert Windows(size=3, scale=8).prepare(torch.rand(1, 3, 16, 24)).shape == (1, 3, 8, 12)


# --- bounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["noise", "shift", "flip", "other", "brighter"])
def test_every_bound_keeps_its_side(by: str) -> None:
    x = picture(3)
    y, windows = changed(x, by), Windows(size=5)
    u, v = (windows.patches(image)[0].double().numpy() for image in (x, y))
    exact, lower, upper = transport(u, v)
    cost, rng, slack = cdist(u, v, "cityblock"), np.random.default_rng(0), 1e-12
    assert bounds.mean(u, v) <= bounds.marginal(u, v) + slack and lower == bounds.marginal(u, v) <= exact + slack
    assert exact <= bounds.greedy(cost) / 75 + slack and exact <= upper + slack and upper == bounds.identity(u, v)
    assert 0 < bounds.signs(u, v, 50, rng) <= exact + slack
    assert 0 < bounds.sphere(u, v, 200, rng) <= exact + slack
    delta = (y - x)[0].double().numpy()
    assert exact <= bounds.perturbation(delta, 5) + slack
    assert upper <= np.abs(delta).max() + slack


def test_the_marginal_bound_and_its_potentials_by_hand() -> None:
    u, v = np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    assert bounds.marginal(u, v) == bounds.mean(u, v) == 0 and transport(u, v)[0] == 0.5
    u, v = points(40, 5, 0), points(40, 5, 1) ** 2
    give, take = bounds.marginal_potentials(u, v)
    assert (give.mean() - take.mean()) / 5 == pytest.approx(bounds.marginal(u, v), rel=1e-12)
    assert (cdist(u, v, "cityblock") - give[:, None] + take[None]).min() >= -1e-12


def test_the_largest_sign_bound_grows_with_the_projections() -> None:
    u, v = points(40, 5, 0), points(40, 5, 1) ** 2
    few, many = (bounds.signs(u, v, count, np.random.default_rng(0)) for count in (1, 200))
    assert few < many <= transport(u, v)[0]


@pytest.mark.parametrize(("d", "constant"), [(1, 1.0), (2, 2 / math.pi), (147, 0.0659), (363, 0.0419)])
def test_the_constant_of_the_sliced_bound(d: int, constant: float) -> None:
    assert bounds.sphere_constant(d) == pytest.approx(constant, rel=1e-3)


def test_greedy_takes_the_cheapest_pair_first_and_may_pay_for_it() -> None:
    assert bounds.greedy(np.array([[1.0, 0.0], [9.0, 2.0]])) == 4.5  # the best pairing costs 1.5


# --- estimates ------------------------------------------------------------------------------------------------


def test_sliced_is_what_sorting_projections_gives() -> None:
    x, y, windows = picture(0, 2).double(), changed(picture(0, 2), "noise").double(), Windows(size=5)
    theta = directions(8, 3, windows, torch.Generator().manual_seed(0))
    assert theta.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0] * 8)
    found = sliced(x, y, windows, theta)
    for i in range(2):
        u, v = (windows.patches(image)[i] @ theta.double().flatten(1).T for image in (x, y))
        along = (u.sort(dim=0).values - v.sort(dim=0).values).abs().mean(0)
        assert found.value[i].item() == pytest.approx(along.mean().item(), rel=1e-9)
        assert found.error[i].item() == pytest.approx(along.std().item() / 8**0.5, rel=1e-9)


def test_sliced_bounds_the_exact_value_and_its_error_shrinks() -> None:
    x = picture(0)
    y, windows = changed(x, "flip"), Windows(size=5)
    exact = measure(x, y, windows).value[0]
    found = {
        n: sliced(x, y, windows, directions(n, 3, windows, torch.Generator().manual_seed(1))) for n in (16, 1024)
    }
    assert found[1024].error[0] < 0.25 * found[16].error[0]  # a factor of 8 in the limit
    assert abs(found[16].value[0] - found[1024].value[0]) < 4 * found[16].error[0]
    assert 0 < found[1024].bound[0] < exact
    assert sliced(x, x, windows, directions(4, 3, windows, torch.Generator())).value[0] == 0


def test_sliced_is_differentiable_and_leads_back() -> None:
    windows = Windows(size=3)
    theta = directions(16, 3, windows, torch.Generator().manual_seed(0))
    small = picture(0, side=6).double()
    start, along = changed(small, "noise"), 1e-6 * picture(5, side=6).double()
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sliced(small, leaf, windows, theta).value.sum(), leaf)
    ahead, behind = (sliced(small, start + s * along, windows, theta).value for s in (1, -1))
    assert ((ahead - behind) / 2).item() == pytest.approx((gradient * along).sum().item(), rel=1e-4)
    x = picture(0)
    y, values = changed(x, "noise"), []
    for _ in range(40):
        leaf = y.requires_grad_()
        loss = sliced(x, leaf, windows, theta).value.sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        y = (leaf - 0.002 * gradient.sign()).detach()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


def test_sliced_follows_the_windows() -> None:
    x, y = picture(0, side=24), changed(picture(0, side=24), "noise")

    def value(windows: Windows) -> float:
        theta = directions(16, 3, windows, torch.Generator().manual_seed(0))
        return float(sliced(x, y, windows, theta).value[0])

    every = value(Windows(size=5))
    assert value(Windows(size=5, count=40)) != every != value(Windows(size=5, stride=2))
    assert value(Windows(size=5, scale=12)) < every < value(Windows(size=5, count=40, sampling="independent"))
    with pytest.raises(UserError, match="do not fit"):
        sliced(x, y, Windows(size=3), torch.rand(4, 3, 5, 5))
    with pytest.raises(UserError, match="2 directions or more"):
        directions(1, 3, Windows(size=3), torch.Generator())


@pytest.mark.parametrize("by", ["noise", "flip", "other"])
def test_sinkhorn_brackets_the_exact_value(by: str) -> None:
    x = picture(0)
    u, v = (Windows(size=5).patches(image)[0].double().numpy() for image in (x, changed(x, by)))
    exact = transport(u, v)[0] * 75
    cost = torch.from_numpy(cdist(u, v, "cityblock"))
    found = sinkhorn(torch.stack([cost, cost.T]))
    assert (found.lower <= exact + 1e-9).all() and (found.upper >= exact - 1e-9).all()
    assert torch.allclose(found.error, found.upper - found.lower) and found.upper[0] < 1.6 * exact
    rough = sinkhorn(cost[None], regularisation=0.1, steps=20)
    assert rough.lower[0] <= exact + 1e-9 <= rough.upper[0] + 2e-9 and rough.error[0] > found.error[0]


def test_a_rounded_plan_has_exact_marginals() -> None:
    plan = rounded(torch.rand(2, 5, 5, dtype=torch.float64) / 20)
    for dim in (1, 2):
        assert torch.allclose(plan.sum(dim), torch.full((2, 5), 0.2, dtype=torch.float64), atol=1e-15)
    assert (plan >= 0).all()


def test_sinkhorn_of_one_point_of_equal_points_and_of_nonsense() -> None:
    assert sinkhorn(torch.full((1, 1, 1), 0.3))[1].item() == pytest.approx(0.3)
    zero = sinkhorn(torch.zeros(1, 4, 4))
    assert (zero.lower.item(), zero.upper.item()) == (0.0, 0.0)
    with pytest.raises(UserError, match="B x n x n"):
        sinkhorn(torch.zeros(4, 4))
    with pytest.raises(UserError, match="regularisation 0"):
        sinkhorn(torch.zeros(1, 4, 4), regularisation=0)


def test_the_protocols_fit_the_images_they_are_for() -> None:
    for name, side, channels in (("digits", 8, 1), ("mnist", 28, 1), ("cifar", 32, 3), ("imagenet", 224, 3)):
        for windows in PROTOCOLS[name]:
            small = windows.prepare(torch.zeros(1, channels, side, side))
            assert 0 < len(windows.places(*small.shape[-2:])) <= 2048
    texts = [str(windows) for windows in PROTOCOLS["imagenet"]]
    assert texts[0] == "11x11, stride 1 at 25 px, all windows"
    assert texts[-1] == "11x11, stride 1, 1024 at the same places" and len(set(texts)) == 5
