"""free: noise that is carried on, one pass for weights and noise, replays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, same, tracked
from torch import Tensor
from training_toys import recipe, run, weights

from casemate.defenses.free import Free, in_ball
from casemate.defenses.standard import Standard
from casemate.fields import spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Update


def test_a_replay_costs_one_pass_each_way() -> None:
    bench, (x, y) = Bench(Free(replays=3)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert (passes.frozen, passes.train, passes.backwards) == ([False], [True], 1)
    assert moved(before, bench.f) and tracked(bench.f) == 1
    assert Free(replays=3).updates_per_batch == 3


def test_the_published_numbers_are_the_defaults() -> None:
    assert (Free().replays, Free().updates_per_batch, Free().step_factor, Free().valid_noise) == (8, 8, 1.0, False)


def test_the_noise_ascends_before_the_weights_move_and_is_carried_on() -> None:
    bench = Bench(Free(), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]), lr=5.0)
    x, y = torch.tensor([[0.5, 0.4], [0.95, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    with Probe(bench.f) as passes:
        first, second = bench.step(x, y), bench.step(x.flip(0), y.flip(0))
    assert torch.equal(passes.inputs[0], x), "the noise begins at zero"
    # up the loss of the first weights: (-1, 1) for label 0, (1, -1) for label 1, though a rate of 5 turns them round
    noise = 0.1 * torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).view(2, 1, 1, 2)
    torch.testing.assert_close(passes.inputs[1], (x.flip(0) + noise).clamp(0, 1))
    clean = F.cross_entropy(x.view(2, 2) @ torch.tensor([[1.0, -2.0], [0.0, 1.0]]).T, y)
    assert first[0][1] == pytest.approx(float(clean), rel=1e-5) and second[0][1] != first[0][1]


def test_a_smaller_batch_takes_and_leaves_the_first_rows() -> None:
    bench, (x, y) = Bench(Free()), batch()
    bench.step(x, y)
    before = bench.ctx.state["noise"].clone()
    with Probe(bench.f) as passes:
        bench.step(x[:3], y[:3])
    torch.testing.assert_close(passes.inputs[0], (x[:3] + before[:3]).clamp(0, 1))
    after = bench.ctx.state["noise"]
    assert torch.equal(after[3:], before[3:]) and not torch.equal(after[:3], before[:3])
    assert float(after.abs().max()) <= LINF.radius + 1e-6


def test_the_step_is_a_share_of_the_radius_and_follows_the_ramp() -> None:
    for options, fraction, expected in [({"step_factor": 0.25}, 0.0, 0.25), ({"ramp": 0.5}, 0.25, 0.5)]:
        bench = Bench(Free(**options))  # type: ignore[arg-type]
        bench.step(*batch(), fraction)
        assert float(bench.ctx.state["noise"].abs().max()) == pytest.approx(expected * LINF.radius)


def test_no_gradient_where_the_sum_is_cut_and_valid_noise_cuts_the_noise() -> None:
    x, y = torch.tensor([1.0, 0.4]).view(1, 1, 1, 2), torch.tensor([1])
    for valid, expected in [(False, 0.1), (True, 0.0)]:
        bench = Bench(Free(valid_noise=valid), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
        bench.step(x, y)  # up, by + 0.1 in the first pixel, which is white already
        assert float(bench.ctx.state["noise"][0, 0, 0, 0]) == pytest.approx(expected)
        noise = bench.ctx.state["noise"].clone()
        bench.step(x, y)
        assert float(bench.ctx.state["noise"][0, 0, 0, 0]) == pytest.approx(expected), "saturated: it stays"
        assert float((bench.ctx.state["noise"] - noise).abs().max()) <= 0.1 + 1e-6


def test_l2_noise_is_projected_on_the_ball() -> None:
    threat = ThreatModel("l2", 0.5)
    delta = torch.tensor([[3.0, 4.0], [0.1, 0.2]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.3, 0.4], [0.1, 0.2]]).view(2, 1, 1, 2)
    torch.testing.assert_close(in_ball(delta, threat), expected)
    bench = Bench(Free(), threat=threat)
    bench.step(*batch())
    torch.testing.assert_close(bench.ctx.state["noise"].flatten(1).norm(dim=1), torch.full((8,), 0.5))


def test_no_radius_and_no_replay_is_standard_training() -> None:
    trained = []
    for defense in (Free(replays=1), Standard()):
        bench = Bench(defense, threat=ThreatModel("linf", 0.0))
        for _ in range(3):
            bench.step(*batch())
        trained.append(parameters(bench.f))
    assert same(*trained)


def test_replays_show_the_batch_again_and_count_as_steps() -> None:
    trained = run(Free(replays=4), recipe(epochs=8))
    assert (trained.steps, trained.epochs, len(trained.curves)) == (32, 8, 2)
    assert {"train_robust", "alarm_pgd"} <= trained.curves[0].keys()


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(Free(), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.005)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and float(bench.ctx.logs["train_robust"]) == 1.0


def test_a_resumed_run_has_its_noise(tmp_path: Any) -> None:
    class Died(Exception):
        pass

    alive = [False]

    @spec
    class Mortal(Free):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            if ctx.step == 10 and not alive[0]:
                raise Died
            yield from super().step(ctx, x, y)

    made = recipe(epochs=6, lr=0.5)
    with pytest.raises(Died), pytest.MonkeyPatch.context() as patch:
        patch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
        run(Mortal(replays=2), made, checkpoints=tmp_path)
    alive[0] = True
    resumed, straight = run(Mortal(replays=2), made, checkpoints=tmp_path), run(Mortal(replays=2), made)
    assert same(weights(resumed), weights(straight)) and resumed.curves == straight.curves
