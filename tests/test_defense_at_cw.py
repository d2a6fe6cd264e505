"""at_cw: AT-PGD on the margin, and the minimum-norm mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, same, tracked

from casemate.defenses.at_cw import ATCW
from casemate.defenses.at_pgd import ATPGD
from casemate.errors import UserError
from casemate.threat import ThreatModel

TWO = [[1.0, -2.0], [0.0, 1.0]]


@pytest.mark.parametrize("mode", ["pgd_margin", "minnorm"])
def test_k_steps_cost_k_input_gradients_and_one_weight_gradient(mode: Any) -> None:
    bench, (x, y) = Bench(ATCW(mode=mode, steps=4)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * 4 + [False] and passes.train == [False] * 4 + [True]
    assert passes.backwards == 5 and moved(before, bench.f) and tracked(bench.f) == 1
    for seen in passes.inputs:
        assert bool(LINF.contains(seen, x).all())


@pytest.mark.parametrize(("bn", "updates"), [("eval", 1), ("train", 1), ("train_update", 5)])
def test_running_statistics_see_what_the_mode_says(bn: Any, updates: int) -> None:
    bench, (x, y) = Bench(ATCW(steps=4, bn_mode_attack=bn)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.train == [bn != "eval"] * 4 + [True] and tracked(bench.f) == updates


def test_the_weights_still_learn_the_cross_entropy() -> None:
    bench = Bench(ATCW(steps=4), lambda: linear_network(TWO))
    ((_, loss),) = bench.step(torch.tensor([0.5, 0.4]).view(1, 1, 1, 2), torch.tensor([0]))
    assert loss == pytest.approx(math.log(1 + math.exp(1.1)), rel=1e-5)  # at (.4, .5)


def test_it_is_at_pgd_with_the_margin() -> None:
    trained = []
    for defense in (ATCW(steps=3), ATPGD(steps=3, objective="margin")):
        bench = Bench(defense)
        for _ in range(3):
            bench.step(*batch())
        trained.append(parameters(bench.f))
    assert same(*trained)


def test_kappa_stops_the_ascent() -> None:
    """z_1 - z_0 = 3 b - a grows by 0.4 a step of 0.1; from 0.7 on a kappa of 0.3 gives no gradient."""
    x, y = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2), torch.tensor([0])
    for kappa, still in [(None, False), (0.3, True)]:
        threat = ThreatModel("linf", 0.0001)  # the start is x, almost; the margin there 0.7
        bench = Bench(ATCW(steps=3, kappa=kappa), lambda: linear_network(TWO), threat)
        with Probe(bench.f) as passes:
            bench.step(x, y)
        assert torch.equal(passes.inputs[0], passes.inputs[-1]) == still


def test_minnorm_ends_at_the_boundary_and_pays_beyond_tau() -> None:
    """x = (.8, .2): z_0 - z_1 = a - 3 b = .2, and the boundary is 0.05 away in linf."""
    x, y, threat = torch.tensor([0.8, 0.2]).view(1, 1, 1, 2), torch.tensor([0]), ThreatModel("linf", 0.3)

    def moved_by(**options: Any) -> float:
        made = ATCW(mode="minnorm", steps=400, minnorm_rate=0.005, **options)
        bench = Bench(made, lambda: linear_network(TWO), threat)
        with Probe(bench.f) as passes:
            bench.step(x, y)
        assert torch.equal(passes.inputs[0], x), "it begins at the image"
        return float((passes.inputs[-1] - x).abs().max())

    assert moved_by() == pytest.approx(0.05, abs=0.005)
    assert moved_by(kappa=0.4) == pytest.approx(0.15, abs=0.005), "0.4 beyond the boundary, at a slope of 4"
    assert moved_by(minnorm_tau=0.3) > 0.08, "nothing brings back what Adam's momentum has carried on"
    # Adam's first step is its rate
    fast = ATCW(mode="minnorm", steps=1, minnorm_rate=0.02)
    bench = Bench(fast, lambda: linear_network(TWO), threat)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert float((passes.inputs[-1] - x).abs().max()) == pytest.approx(0.02, rel=1e-3), (
        "Adam's first step is its rate"
    )


@pytest.mark.parametrize(("options", "count", "reach"), [({}, 100, 0.05), ({"steps": 10}, 10, 0.01)])
def test_minnorm_has_a_hundred_steps_which_reach_the_boundary(
    options: dict[str, Any], count: int, reach: float
) -> None:
    """x = (.8, .2), 0.05 from the boundary in linf; each step goes 0.001, Adam's rate."""
    x, y = torch.tensor([0.8, 0.2]).view(1, 1, 1, 2), torch.tensor([0])
    bench = Bench(ATCW(mode="minnorm", **options), lambda: linear_network(TWO), ThreatModel("linf", 0.3))
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert len(passes.inputs) == count + 1
    assert float((passes.inputs[-1] - x).abs().max()) == pytest.approx(reach, abs=0.003)


def test_the_margin_is_climbed_in_ten_steps() -> None:
    assert ATCW().ascent(LINF, 0.0) == ATPGD().ascent(LINF, 0.0)
    planned = ATCW(mode="minnorm", plan=((0.5, 20),))
    assert [planned.ascent(LINF, at).steps for at in (0.4, 0.5)] == [100, 20]


def test_minnorm_needs_linf() -> None:
    with pytest.raises(UserError, match=r"minnorm needs an linf threat model, not l2 0\.5; use mode: pgd_margin"):
        Bench(ATCW(mode="minnorm"), threat=ThreatModel("l2", 0.5))


@pytest.mark.parametrize("mode", ["pgd_margin", "minnorm"])
def test_it_learns_one_batch(mode: Any) -> None:
    threat = ThreatModel("linf", 0.02)
    bench, (x, y) = Bench(ATCW(mode=mode, steps=3), optimizer=torch.optim.Adam, threat=threat), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and bool((bench.f(x).argmax(1) == y).all())
