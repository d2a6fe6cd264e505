"""fgsm_ut: passes, the corner it trains on, the ramp, batch-norm modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, same, tracked

from casemate.defenses.fgsm_ut import FGSMUT
from casemate.threat import ThreatModel


def test_one_input_gradient_and_one_weight_gradient() -> None:
    bench, (x, y) = Bench(FGSMUT()), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert (passes.frozen, passes.train, passes.backwards) == ([True, False], [False, True], 2)
    assert torch.equal(passes.inputs[0], x), "no random start"
    assert moved(before, bench.f) and tracked(bench.f) == 1


@pytest.mark.parametrize(("mode", "updates"), [("eval", 1), ("train", 1), ("train_update", 2)])
def test_running_statistics_see_what_the_mode_says(mode: Any, updates: int) -> None:
    bench, (x, y) = Bench(FGSMUT(bn_mode_attack=mode)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.train == [mode != "eval", True] and tracked(bench.f) == updates


def test_the_loss_is_that_of_the_worst_corner_of_a_linear_model() -> None:
    bench = Bench(FGSMUT(), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
    x = torch.tensor([[0.5, 0.4], [0.95, 0.6]]).view(2, 1, 1, 2)
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, torch.tensor([0, 1]))
    torch.testing.assert_close(passes.inputs[1].flatten(), torch.tensor([0.4, 0.5, 1.0, 0.5]))  # cut to the box
    # z = (-.6, .5) with label 0; z = (0, .5) with label 1
    assert loss == pytest.approx((math.log(1 + math.exp(1.1)) + math.log(1 + math.exp(-0.5))) / 2, rel=1e-5)
    assert float(bench.ctx.logs["train_robust"]) == 0.5


def test_the_radius_grows_over_the_ramp() -> None:
    bench, (x, y) = Bench(FGSMUT(ramp=0.5)), batch()
    for fraction, share in [(0.25, 0.5), (0.5, 1.0), (0.9, 1.0)]:
        with Probe(bench.f) as passes:
            bench.step(x, y, fraction)
        assert float((passes.inputs[1] - x).abs().max()) == pytest.approx(share * LINF.radius, abs=1e-6)


def test_l2_moves_by_the_radius_along_the_gradient() -> None:
    bench = Bench(FGSMUT(), lambda: linear_network([[3.0, 0.0], [0.0, 4.0]]), ThreatModel("l2", 0.25))
    with Probe(bench.f) as passes:
        bench.step(torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]))
    torch.testing.assert_close(passes.inputs[-1].flatten(), torch.tensor([0.35, 0.7]))


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(FGSMUT(), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.02)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and float(bench.ctx.logs["train_robust"]) == 1.0


def test_the_alarm_takes_part_in_no_update() -> None:
    trained = []
    for alarm in ("off", "warn"):
        bench = Bench(FGSMUT(alarm=alarm))  # type: ignore[arg-type]
        bench.step(*batch())
        trained.append(parameters(bench.f))
        assert ("alarm/train" in bench.ctx.state) == (alarm == "warn")
    assert same(*trained)
