"""SPSA and RayS against closed forms, with every query counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from test_attack_gradient import linear_problem
from torch import Tensor

from casemate.attacks import black_box
from casemate.attacks.black_box import SPSA, RayS, Rays, spsa_gradient
from casemate.attacks.gradient import PGD
from casemate.errors import UserError
from casemate.system import Offer, System, TorchSystem, View
from casemate.threat import ThreatModel, targeted, untargeted

LINF = ThreatModel("linf", 0.1)
WHOLE = ThreatModel("linf", 1.0)


class Endpoint(System):
    """What a remote model shows of `inner`: scores, or labels alone, of images in the box."""

    def __init__(self, inner: TorchSystem, offers: Any) -> None:
        self.inner, self.offers, self.name = inner, frozenset(offers), "endpoint"
        self.input_shape, self.num_classes = inner.input_shape, inner.num_classes
        self.asked: list[int] = []

    def logits(self, x: Tensor) -> Tensor:
        assert "scores" in self.offers, "it offers no scores"
        return self._answer(x)

    def decide(self, x: Tensor) -> Tensor:
        return self._answer(x).argmax(1)

    def _answer(self, x: Tensor) -> Tensor:
        assert float(x.min()) >= 0 and float(x.max()) <= 1 and not x.requires_grad
        self.asked.append(len(x))
        return self.inner.logits(x).detach()

    def views(self) -> dict[str, View]:
        return {"adaptive": View("adaptive", self.logits, "scores" in self.offers, self.offers)}

    def hash(self) -> str:
        return "endpoint"


def endpoint(inner: TorchSystem, *offers: Offer) -> Endpoint:
    return Endpoint(inner, offers)


# --- SPSA ----------------------------------------------------------------------------------------------------


def test_the_estimate_of_a_linear_slope_is_right_on_average_and_its_variance_falls_like_one_over_n() -> None:
    """(L+ - L-) / 2 sigma = <w, v>, so an estimate of p pairs has mean w and, in coordinate i, variance
    (|w|^2 - w_i^2) / p."""
    rng = torch.Generator().manual_seed(0)
    w = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    x = torch.full((1, 1, 1, 5), 0.5, dtype=torch.float64)
    runs, spread = 4000, []
    for pairs in (4, 16):
        signs = torch.randint(0, 2, (runs, pairs, 1, 1, 5), generator=rng) * 2 - 1
        found = spsa_gradient(lambda p: p.flatten(1) @ w, x.expand(runs, -1, -1, -1), signs, 0.01).flatten(1)
        expected = (w @ w - w**2) / pairs
        assert torch.allclose(found.mean(0), w, atol=5 * float(expected.max() / runs) ** 0.5)
        spread.append(((found - w) ** 2).mean(0))
        assert torch.allclose(spread[-1], expected, rtol=0.15)
    assert torch.allclose(spread[0] / spread[1], torch.full((5,), 4.0, dtype=torch.float64), rtol=0.2)


def test_the_estimate_is_the_same_in_calls_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    signs = torch.randint(0, 2, (3, 20, 1, 2, 2), generator=torch.Generator().manual_seed(2)) * 2 - 1
    asked: list[int] = []

    def value(points: Tensor) -> Tensor:
        asked.append(len(points))
        return points.flatten(1).square().sum(1)

    whole = spsa_gradient(value, x, signs, 0.1)
    monkeypatch.setattr(black_box, "BATCH", 18)
    parts = spsa_gradient(value, x, signs, 0.1)
    assert asked == [120, *[18] * 6, 12] and torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_spsa_succeeds_exactly_within_the_distance(norm: Any) -> None:
    victim, x, y, linf, l2 = linear_problem(2)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    clear = (distances / radius - 1).abs() > 0.1  # estimates are noisy
    for goal in (untargeted(y), targeted(y, 1 - y)):
        result = SPSA(steps=60, samples=128)(endpoint(victim, "scores"), x, goal, ThreatModel(norm, radius))
        assert torch.equal(result.success[clear], (distances < radius)[clear])


def test_spsa_counts_every_query_and_stops_where_an_image_has_fallen() -> None:
    x, y = digits()
    for together in (1, 4):
        counter = Counter(trained_network())
        victim = system(counter, (1, 8, 8), 10)
        attack = SPSA(steps=5, samples=black_box.BATCH // together)
        result = attack(victim, x[1500:1510], untargeted(y[1500:1510]), LINF)
        assert sum(counter.forwards) == int((result.cost.queries + result.cost.forwards).sum())
        assert counter.gradients == [] and result.cost.forwards.tolist() == [1] * 10
        assert max(counter.forwards) <= black_box.BATCH
        most = 5 * (attack.samples + 1)
        assert attack.passes(victim.views()["adaptive"], 10) == (0, 0, 10 * most)
        assert result.cost.queries[~result.success].tolist() == [most] * int((~result.success).sum())
        assert bool(result.success.any()) and int(result.cost.queries.min()) < most


def test_spsa_gives_an_image_the_same_among_others() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = SPSA(steps=4, samples=32)
    some = attack(victim, x[1510:1520], untargeted(y[1510:1520]), LINF, 5)
    alone = attack(victim, x[1510:1511], untargeted(y[1510:1511]), LINF, 5)
    assert not bool(alone.success) and torch.allclose(alone.x_adv[0], some.x_adv[0], atol=1e-4)
    assert not torch.allclose(attack(victim, x[1510:1511], untargeted(y[1510:1511]), LINF, 6).x_adv, alone.x_adv)


def test_spsa_fells_no_more_than_white_box_does_and_more_with_more_samples() -> None:
    x, y = digits()
    victim, x, goal = system(trained_network(), (1, 8, 8), 10), x[1500:1530], untargeted(y[1500:1530])
    few, many = (int(SPSA(steps=12, samples=n)(victim, x, goal, LINF).success.sum()) for n in (2, 128))
    white = int(PGD(steps=40)(victim, x, goal, LINF).success.sum())
    assert few < many <= white + 1 and many >= 0.7 * white


def test_spsa_needs_scores_and_pairs() -> None:
    victim, x, y, _, _ = linear_problem(2)
    with pytest.raises(UserError, match="samples must be even, and is 9"):
        SPSA(samples=9)
    with pytest.raises(UserError, match="attack SPSA needs scores, and endpoint offers only labels"):
        SPSA()(endpoint(victim, "labels"), x, untargeted(y), LINF)


# --- RayS ----------------------------------------------------------------------------------------------------


def test_rays_converges_to_the_linf_distance_by_labels_alone() -> None:
    """(z_y - z_j) / ||w_y - w_j||_1: towards a linear boundary the best direction is a vector of signs."""
    victim, x, y, distances, _ = linear_problem(2)
    result = RayS(queries=600, stop_inside=False)(endpoint(victim, "labels"), x, untargeted(y), WHOLE)
    found = WHOLE.distance(result.x_adv, x)
    assert bool(result.success.all())
    assert bool((found > distances - 1e-6).all()) and bool((found < distances + 0.001 / 12**0.5 + 1e-5).all())


def test_rays_meets_a_target() -> None:
    victim, x, y, distances, _ = linear_problem(2)
    attack = RayS(queries=600, stop_inside=False)
    result = attack(endpoint(victim, "labels"), x, targeted(y, 1 - y), WHOLE)
    assert torch.allclose(WHOLE.distance(result.x_adv, x), distances, atol=5e-4)


def test_rays_never_claims_less_than_the_distance_and_succeeds_within_it() -> None:
    victim, x, y, distances, _ = linear_problem(4)
    result = RayS(queries=800, stop_inside=False)(endpoint(victim, "labels"), x, untargeted(y), WHOLE)
    found = WHOLE.distance(result.x_adv, x)
    assert bool((found > distances - 1e-6).all()) and float((found / distances).median()) < 1.02
    radius = float(distances.median())
    inside = RayS(queries=800)(endpoint(victim, "labels"), x, untargeted(y), ThreatModel("linf", radius))
    assert not bool((inside.success & (distances > radius + 1e-6)).any())
    assert int(inside.success.sum()) >= 0.9 * int((distances < radius).sum())


def test_blocks_are_halved_down_to_a_pixel() -> None:
    """Five pixels: ceil(5 / 1), ceil(5 / 2), ceil(5 / 4), ceil(5 / 8) in a block; then single pixels again."""
    x = torch.full((1, 1, 1, 5), 0.5)
    rays = Rays.first(x, untargeted(torch.tensor([0])), 1e-3)
    flipped = []
    for _ in range(17):
        flipped.append(tuple((rays.attempt[0] != rays.signs[0]).nonzero()[:, 0].tolist()))
        rays.advance(torch.tensor([False]), torch.tensor([False]))
    pixels = [(0,), (1,), (2,), (3,), (4,)]
    assert flipped == [(0, 1, 2, 3, 4), (0, 1, 2), (3, 4), (0, 1), (2, 3), (4,), *pixels, *pixels, (0,)]


def test_one_search_by_hand() -> None:
    """One pixel at 0.5, wrong at 0.3 and below: down at radius 1 (saturated), then bisection between 0 and 1."""
    victim = linear_system(torch.tensor([[1.0], [0.0]]), torch.tensor([-0.3, 0.0]))
    x, goal = torch.full((1, 1, 1, 1), 0.5), untargeted(torch.tensor([0]))
    seen = []

    class Watched(Endpoint):
        def _answer(self, x: Tensor) -> Tensor:
            seen.append(round(float(x), 6))
            return super()._answer(x)

    attack = RayS(queries=8, tolerance=0.1, stop_inside=False)
    result = attack(Watched(victim, {"labels"}), x, goal, WHOLE)
    # clean; saturated; 1/2, 1/4, 1/8, 3/16, 7/32 below 0.5; the bounds 7/32 and 1/4 are within 0.1 sooner
    assert seen[:6] == [0.5, 0.0, 0.0, 0.25, 0.375, 0.3125]
    assert float(result.x_adv) == pytest.approx(0.25)  # 1/4 succeeded, 3/16 did not, and 1/4 - 3/16 < 0.1
    assert seen[6:] == [0.75, 0.75, 0.25]  # the flip fails at radius 1/4, twice; last is the verification


def test_rays_counts_every_query_and_never_asks_too_often() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim = system(counter, (1, 8, 8), 10)
    attack = RayS(queries=70)
    result = attack(victim, x[1500:1530], untargeted(y[1500:1530]), LINF)
    assert sum(counter.forwards) == int((result.cost.queries + result.cost.forwards).sum())
    assert counter.gradients == [] and result.cost.forwards.tolist() == [1] * 30
    assert result.cost.queries[~result.success].tolist() == [70] * int((~result.success).sum())
    assert attack.passes(victim.views()["adaptive"], 30) == (0, 0, 2100)
    already = victim.decide(x[1500:1530]) != y[1500:1530]
    assert bool(already.any()) and result.cost.queries[already].tolist() == [1] * int(already.sum())
    assert torch.equal(result.x_adv[already], x[1500:1530][already])
    won = result.success & ~already
    assert int(won.sum()) > 3 and bool((LINF.distance(result.x_adv, x[1500:1530])[won] <= 0.1 + 1e-6).all())


def test_more_queries_only_bring_the_image_nearer_and_others_do_not_matter() -> None:
    x, y = digits()
    victim, x, goal = system(trained_network(), (1, 8, 8), 10), x[1500:1520], untargeted(y[1500:1520])
    near, far = (RayS(queries=n, stop_inside=False)(victim, x, goal, WHOLE) for n in (400, 100))
    assert bool((WHOLE.distance(near.x_adv, x) <= WHOLE.distance(far.x_adv, x)).all())
    assert float(WHOLE.distance(near.x_adv, x).mean()) < 0.9 * float(WHOLE.distance(far.x_adv, x).mean())
    alone = RayS(queries=100, stop_inside=False)(victim, x[7:8], goal[torch.tensor([7])], WHOLE)
    assert torch.allclose(alone.x_adv[0], far.x_adv[7], atol=1e-3)


def test_rays_leaves_an_image_that_no_direction_puts_wrong() -> None:
    victim = linear_system(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0]))
    x = torch.rand(3, 1, 1, 2)
    result = RayS(queries=40)(endpoint(victim, "labels"), x, untargeted(torch.zeros(3).long()), LINF)
    assert torch.equal(result.x_adv, x) and not bool(result.success.any())
    assert result.cost.queries.tolist() == [40] * 3


def test_rays_finds_no_more_than_the_white_box() -> None:
    x, y = digits()
    victim, x, goal = system(trained_network(), (1, 8, 8), 10), x[1500:1540], untargeted(y[1500:1540])
    black = RayS(queries=500)(victim, x, goal, LINF).success
    white = PGD(steps=50, restarts=3)(victim, x, goal, LINF).success
    assert int((black & ~white).sum()) <= 1 and int(black.sum()) >= 0.6 * int(white.sum())


def test_rays_works_in_linf_only() -> None:
    victim, x, y, _, _ = linear_problem(2)
    with pytest.raises(UserError, match="RayS works in linf, not in l2"):
        RayS()(victim, x, untargeted(y), ThreatModel("l2", 1.0))
