"""n_fgsm: strong noise, no projection, and fgsm_rs as a special case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, same, tracked

from casemate.defenses.fgsm_rs import FGSMRS
from casemate.defenses.n_fgsm import NFGSM
from casemate.seeding import generator
from casemate.threat import ThreatModel


@pytest.mark.parametrize(("mode", "updates"), [("train_update", 2), ("train", 1), ("eval", 1)])
def test_passes_and_running_statistics(mode: Any, updates: int) -> None:
    assert NFGSM().bn_mode_attack == "train_update"
    bench, (x, y) = Bench(NFGSM(bn_mode_attack=mode)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert (passes.frozen, passes.train, passes.backwards) == ([True, False], [mode != "eval", True], 2)
    assert moved(before, bench.f) and tracked(bench.f) == updates


def test_what_it_trains_on_may_be_three_radii_away_and_is_an_image() -> None:
    bench, (x, y) = Bench(NFGSM()), batch(64)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    start = ThreatModel("linf", 2 * LINF.radius).random_start(x, generator("step", 0)).clamp(0, 1)
    assert torch.equal(passes.inputs[0], start)
    furthest = float((passes.inputs[1] - x).abs().max())
    assert 2.5 * LINF.radius < furthest <= 3 * LINF.radius + 1e-6
    assert float(passes.inputs[1].min()) >= 0 and float(passes.inputs[1].max()) <= 1
    assert float((passes.inputs[1] - start).abs().max()) == pytest.approx(LINF.radius, abs=1e-6)


def test_noise_step_and_clip_are_options() -> None:
    x = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2)

    def ends(**options: Any) -> torch.Tensor:
        bench = Bench(NFGSM(**options), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
        with Probe(bench.f) as passes:
            bench.step(x, torch.tensor([0]))
        return passes.inputs[1].flatten()

    torch.testing.assert_close(ends(noise=0), torch.tensor([0.4, 0.5]))
    torch.testing.assert_close(ends(noise=0, step_factor=3), torch.tensor([0.2, 0.7]))
    torch.testing.assert_close(ends(noise=0, step_factor=3, clip=2), torch.tensor([0.3, 0.6]))


def test_it_is_fgsm_rs_with_noise_1_and_clip_1() -> None:
    trained = []
    for defense in (NFGSM(noise=1, clip=1, step_factor=1.25), FGSMRS()):
        bench = Bench(defense)
        for _ in range(3):
            bench.step(*batch())
        trained.append(parameters(bench.f))
    assert same(*trained)


def test_l2_is_not_projected_either() -> None:
    threat = ThreatModel("l2", 0.2)
    bench, (x, y) = Bench(NFGSM(), threat=threat), batch(64)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    distance = threat.distance(passes.inputs[1], x)
    assert 0.3 < float(distance.max()) <= 0.6 + 1e-6


def test_the_radius_grows_over_the_ramp() -> None:
    bench, (x, y) = Bench(NFGSM(ramp=0.5)), batch(64)
    with Probe(bench.f) as passes:
        bench.step(x, y, 0.25)
    assert 2.5 < float((passes.inputs[1] - x).abs().max()) / (LINF.radius / 2) <= 3 + 1e-5


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(NFGSM(), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.005)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and float(bench.ctx.logs["train_robust"]) == 1.0
