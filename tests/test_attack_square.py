"""The Square attack: its schedule, its proposals, that it only ever gains, and what it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from test_attack_apgd import Recorder, smooth_network
from test_attack_engine import Inexact, standing
from test_attack_gradient import linear_problem
from torch import Tensor

from casemate.attacks.square import Draw, Square, bump, draws, l2_proposal, pattern, side, stripes, tiles, window
from casemate.objectives import margin
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, targeted, untargeted

# --- parts --------------------------------------------------------------------------------------------------------


def test_the_squares_shrink_as_the_schedule_says() -> None:
    """Sides on 28 x 28 images: sqrt(784 p) with p = .8, .4, .2 ..., after 10, 50, 200, 500, 1000, 2000, 4000."""
    first = [0, 11, 51, 201, 501, 1001, 2001, 4001]
    assert [side(i, 0.8, 28, 28) for i in first] == [25, 18, 13, 9, 6, 4, 3, 2]
    assert [side(i - 1, 0.8, 28, 28) for i in first[1:]] == [25, 18, 13, 9, 6, 4, 3]
    assert side(4999, 0.8, 28, 28) == 2 and side(9999, 0.8, 28, 28) == 1
    assert side(4999, 0.8, 28, 28, rescaled=5000) == 1 and side(6, 0.8, 28, 28, rescaled=5000) == 18
    assert side(0, 1.0, 4, 16) == 4  # never beyond the image


def test_squares_reach_every_place_alike_and_no_image_has_anothers() -> None:
    rng, shape = torch.Generator().manual_seed(0), torch.Size((4000, 2, 6, 5))
    index = window(torch.rand(4000, 2, generator=rng), 3, shape)
    marked = torch.zeros(shape)
    marked[index] = 1
    assert torch.equal(marked.sum((2, 3)), torch.full((4000, 2), 9.0))
    assert torch.equal(marked[:, 0], marked[:, 1])
    corners = torch.stack([index[2][:, 0, 0, 0], index[3][:, 0, 0, 0]], 1)
    places, counts = corners.unique(dim=0, return_counts=True)
    assert len(places) == 4 * 3 and counts.min() > 4000 / 12 * 0.8
    last = window(torch.full((1, 2), 1 - 2**-24), 3, torch.Size((1, 2, 6, 5)))
    assert int(last[2].max()) == 5 and int(last[3].max()) == 4


def test_the_pattern_of_l2_is_two_opposite_bumps_of_length_one() -> None:
    assert torch.allclose(bump(3, 3), torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25], [0.25, 0.25, 0.25]]))
    for size in (1, 2, 3, 5, 8):
        one = pattern(size)
        assert one.shape == (size, size) and float(one.norm()) == pytest.approx(1)
        assert (one[: size // 2] > 0).all() and (one[size // 2 :] < 0).all()
        if size > 1:
            assert float(one[: size // 2].norm()) == pytest.approx(0.5**0.5)


def test_noise_is_drawn_for_every_image_and_does_not_depend_on_how_many_queries_follow() -> None:
    x = torch.zeros(3, 2, 8, 8)
    short, long = (list(draws(x, torch.Generator().manual_seed(1), n)) for n in (128, 300))
    assert len(short) == 128 and len(long) == 300
    assert all(
        torch.equal(a.corners, b.corners) and torch.equal(a.signs, b.signs)
        for a, b in zip(short, long[:128], strict=True)
    )
    assert set(torch.stack([d.signs for d in long]).unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(long[0].corners[0], long[0].corners[1])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 9), (1, 28, 28)])
def test_starts_lie_at_the_full_radius(shape: tuple[int, int, int]) -> None:
    x = torch.full((4, *shape), 0.5)
    start = stripes(x, 0.1, torch.Generator().manual_seed(0)) - x
    assert torch.allclose(start.abs(), torch.tensor(0.1)) and torch.equal(start[:, :, :1].expand_as(start), start)
    assert not torch.equal(start[0], start[1])
    start = tiles(x, 0.7, torch.Generator().manual_seed(0)) - x
    assert torch.allclose(start.flatten(1).norm(dim=1), torch.tensor(0.7))
    assert not torch.equal(start[0], start[1])


def test_a_proposal_of_l2_moves_length_and_loses_none() -> None:
    rng, threat = torch.Generator().manual_seed(0), ThreatModel("l2", 0.4)
    x = torch.full((50, 2, 9, 9), 0.5)
    best = tiles(x, 0.4, rng)
    for _ in range(5):
        draw = Draw(torch.rand(50, 4, generator=rng), torch.ones(50, 2), torch.rand(50, generator=rng) < 0.5)
        tried = l2_proposal(best, x, threat, 3, draw)
        assert torch.allclose(threat.distance(tried, x), torch.tensor(0.4), atol=1e-6)
        here, there = (window(draw.corners[:, i : i + 2], 3, x.shape) for i in (0, 2))
        touched = torch.zeros_like(x, dtype=torch.bool)
        touched[here] = touched[there] = True
        assert torch.allclose(tried[~touched], best[~touched], atol=1e-6)
        cleared = touched.clone()
        cleared[here] = False
        assert torch.allclose(tried[cleared], x[cleared]) and not torch.allclose(tried[here], best[here])
        best = tried


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_only_ever_gains_and_stays_in_the_ball(norm: Any) -> None:
    """Every image shown is the best so far with one change; the margin of the best never falls."""
    x, y = digits()
    right = trained_network()(x).argmax(1) == y
    x, y = (0.4 + 0.2 * x[right][:6]).clone(), y[right][:6]  # away from the walls
    recorder = Recorder(trained_network())
    victim = Inexact(recorder, input_shape=(1, 8, 8), num_classes=10)
    threat, goal = ThreatModel(norm, 0.05 if norm == "linf" else 0.3), untargeted(y)
    result = Square(queries=300)(victim, x, goal, threat)
    assert len(recorder.seen) == 1 + 300 + 1
    best, value = recorder.seen[0], torch.full((6,), -torch.inf)
    gains = 0
    for tried in recorder.seen[:-1]:
        assert (threat.distance(tried, x) <= threat.radius + 1e-6).all()
        if norm == "linf":
            assert torch.allclose((tried - x).abs(), torch.tensor(0.05), atol=1e-6)
            assert torch.isin(((tried - best).abs() > 1e-6).flatten(1).sum(1), torch.tensor(range(65))).all()
        with torch.no_grad():
            values = margin(trained_network()(tried), goal)
        better = values > value
        gains += int(better.sum())
        best, value = torch.where(better.view(-1, 1, 1, 1), tried, best), torch.where(better, values, value)
    assert torch.equal(result.x_adv, best) and gains > 6 * 10


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.15), ("l2", 0.5)])
def test_it_fells_what_random_search_can_and_nothing_beyond_the_distance(norm: Any, radius: float) -> None:
    victim, x, y, linf, l2 = linear_problem(2)
    x, shape = x.view(-1, 1, 3, 4), (1, 3, 4)
    victim = TorchSystem(victim.classifier, input_shape=shape, num_classes=2)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    result = Square(queries=500)(victim, x, untargeted(y), ThreatModel(norm, radius))
    assert not result.success[distances > radius * 1.001].any()
    assert result.success[distances < radius * (0.9 if norm == "linf" else 0.6)].all()


def test_towards_a_target_it_raises_that_class() -> None:
    x, y = digits()
    victim, target = system(trained_network(), (1, 8, 8), 10), (y[:40] + 1) % 10
    result = Square(queries=300)(victim, x[:40], targeted(y[:40], target), ThreatModel("linf", 0.4))
    assert int(result.success.sum()) > 10 and torch.equal(result.prediction[result.success], target[result.success])


class Scores(TorchSystem):
    """A classifier that gives its scores and no gradient."""

    def __init__(self, counter: Counter) -> None:
        super().__init__(counter, input_shape=(1, 8, 8), num_classes=10)
        self.offers = frozenset({"scores", "labels"})


def test_scores_are_all_it_needs() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    result = Square(queries=50)(Scores(counter), x[:50], untargeted(y[:50]), ThreatModel("linf", 0.2))
    assert 0 < int(result.success.sum()) < 50 and not counter.gradients
    assert Square.needs == frozenset({"scores"})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_that_stands_costs_one_query_more_than_asked_and_others_leave_at_once(norm: Any) -> None:
    victim, counter, x, goal = standing()
    result = Square(queries=30)(victim, x, goal, ThreatModel(norm, 0.001))
    assert counter.forwards == [8] * 32 and not counter.gradients
    assert result.cost.queries.tolist() == [31] * 8 and result.cost.forwards.tolist() == [1] * 8
    assert Square(queries=30).passes(victim.views()["adaptive"], 8) == (0, 0, 248)
    assert Square().passes(victim.views()["adaptive"], 1) == (0, 0, 5001)

    x, y = digits()
    counter.forwards.clear()
    radius = 0.2 if norm == "linf" else 1.0
    result = Square(queries=60)(victim, x[:60], untargeted(y[:60]), ThreatModel(norm, radius))
    assert counter.forwards[:-1] == sorted(counter.forwards[:-1], reverse=True) and counter.forwards[-2] < 60
    assert sum(counter.forwards[:-1]) == int(result.cost.queries.sum())
    paid = result.cost.queries
    assert [int((paid > k).sum()) for k in range(len(counter.forwards) - 1)] == counter.forwards[:-1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_does_not_feel_what_becomes_of_the_others(norm: Any) -> None:
    x, y = digits()
    x, y = x[:40].double(), y[:40]
    victim, threat = system(smooth_network(), (1, 8, 8), 10), ThreatModel(norm, 0.12 if norm == "linf" else 0.8)
    alone = Square(queries=80)(victim, x, untargeted(y), threat)
    labels = y.clone()
    labels[::2] = (labels[::2] + 1) % 10
    among = Square(queries=80)(victim, x, untargeted(labels), threat)
    assert among.success[::2].all() and not alone.success.all()
    assert torch.allclose(alone.x_adv[1::2], among.x_adv[1::2], atol=1e-9)
    other = Square(queries=80)(victim, x, untargeted(y), threat, 1)
    assert not torch.allclose(alone.x_adv, other.x_adv)


def test_small_and_flat_images_are_searched_too() -> None:
    for shape in ((1, 1, 1), (2, 1, 7), (1, 2, 2), (3, 4, 5)):
        size = shape[0] * shape[1] * shape[2]
        weight = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
        victim, x = linear_system(weight, shape=shape), torch.full((4, *shape), 0.5)
        y: Tensor = victim.decide(x)
        for norm in ("linf", "l2"):
            threat = ThreatModel(norm, 0.2)  # type: ignore[arg-type]
            result = Square(queries=40)(victim, x, untargeted(y), threat)
            assert threat.contains(result.x_adv, x).all()
