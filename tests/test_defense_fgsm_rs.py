"""fgsm_rs: starts, passes, statistics, the authors' early stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, tracked
from torch import Tensor
from training_toys import data, recipe, run, same, weights

from casemate.defenses.fgsm_rs import FGSMRS
from casemate.fields import spec
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.trainable import Context, Update


@pytest.mark.parametrize(("mode", "updates"), [("train_update", 2), ("train", 1), ("eval", 1)])
def test_passes_and_running_statistics(mode: Any, updates: int) -> None:
    assert FGSMRS().bn_mode_attack == "train_update"
    bench, (x, y) = Bench(FGSMRS(bn_mode_attack=mode)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert (passes.frozen, passes.train, passes.backwards) == ([True, False], [mode != "eval", True], 2)
    assert moved(before, bench.f) and tracked(bench.f) == updates


def test_the_start_is_uniform_and_cut_to_the_box_and_the_end_in_the_ball() -> None:
    threat = ThreatModel("linf", 0.2)
    bench, (x, y) = Bench(FGSMRS(), threat=threat), batch()
    x = (x - 0.3).clamp(0, 1)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert torch.equal(passes.inputs[0], threat.random_start(x, generator("step", 0)).clamp(0, 1))
    assert bool(threat.contains(passes.inputs[1], x).all())


def test_the_step_is_that_of_the_option() -> None:
    """Half a radius from the start, where the ball does not cut it."""
    bench = Bench(FGSMRS(step_factor=0.5, init="zero"), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
    x = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2)
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, torch.tensor([0]))
    assert torch.equal(passes.inputs[0], x)
    torch.testing.assert_close(passes.inputs[1].flatten(), torch.tensor([0.45, 0.45]))
    assert loss == pytest.approx(math.log(1 + math.exp(0.9)), rel=1e-5)  # z = (-.45, .45)


def test_previous_begins_where_the_batch_before_ended() -> None:
    bench, (x, y) = Bench(FGSMRS(init="previous")), batch()
    with Probe(bench.f) as passes:
        for images, labels in [(x, y), (x.flip(0), y.flip(0)), (x[:3], y[:3]), (x, y)]:
            bench.step(images, labels)
    starts, ends = passes.inputs[::2], passes.inputs[1::2]
    assert torch.equal(starts[0], x)
    noise = ends[0] - x
    torch.testing.assert_close(starts[1], (x.flip(0) + noise).clamp(0, 1))
    noise = ends[1] - x.flip(0)
    torch.testing.assert_close(starts[2], (x[:3] + noise[:3]).clamp(0, 1))  # a smaller batch takes the first
    noise[:3] = ends[2] - x[:3]
    torch.testing.assert_close(starts[3], (x + noise).clamp(0, 1))  # and leaves the rest
    assert float(noise.abs().max()) <= LINF.radius + 1e-6


def test_the_radius_grows_over_the_ramp() -> None:
    bench, (x, y) = Bench(FGSMRS(ramp=0.5)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y, 0.25)
    assert float((passes.inputs[1] - x).abs().max()) == pytest.approx(LINF.radius / 2, abs=1e-6)


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(FGSMRS(), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.02)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and float(bench.ctx.logs["train_robust"]) == 1.0


@spec
class Spoiled(FGSMRS):
    """Unlearns from epoch 12 on."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        for update in super().step(ctx, x, y):
            sign = 1 if ctx.epoch < 12 else -1
            yield Update(update.players, lambda update=update, sign=sign: sign * update.loss())  # type: ignore[misc]


def test_early_stop_goes_back_to_the_epoch_before_the_drop(capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(epochs=30, lr=0.5)
    stopped = run(Spoiled(early_stop=True, alarm="off"), made)
    measured = [row["early_stop_pgd"] for row in stopped.curves]
    drops = [b - a for a, b in zip(measured[1:], measured, strict=False)]
    assert drops[-1] > 0.2 and max(drops[:-1]) <= 0.2
    assert 12 <= stopped.chosen_epoch == stopped.epochs - 1 < 29
    assert "stopped early: PGD-5 leaves" in capsys.readouterr().err
    kept = run(Spoiled(alarm="off"), recipe(epochs=stopped.chosen_epoch, lr=0.5))
    assert same(weights(stopped), weights(kept)) and "early_stop_pgd" not in kept.curves[0]


def test_early_stop_measures_the_first_batch_of_the_epoch() -> None:
    """10 images: accuracies are tenths. An epoch later the batch is another."""
    seen: list[Tensor] = []

    @spec
    class Watched(FGSMRS):
        def epoch_end(self, ctx: Context, validate: Any) -> None:
            seen.append(ctx.state["early_stop/x"])
            super().epoch_end(ctx, validate)
            assert "early_stop/x" not in ctx.state

    rows = run(Watched(early_stop=True), recipe(epochs=2)).curves
    samples = data()
    for epoch, (row, x) in enumerate(zip(rows, seen, strict=True)):
        first, *_ = samples.batches(10, seed=0, epoch=epoch)
        assert torch.equal(x, first.x) and row["early_stop_pgd"] * 10 == pytest.approx(
            round(row["early_stop_pgd"] * 10)
        )


@pytest.mark.parametrize("options", [{"init": "previous"}, {"early_stop": True}])
def test_a_resumed_run_goes_on_as_it_was(options: dict[str, Any], tmp_path: Any) -> None:
    class Died(Exception):
        pass

    def die(trained: object) -> None:
        raise Died

    made = recipe(epochs=4, lr=0.5)
    straight = run(FGSMRS(**options), made)
    with pytest.raises(Died), pytest.MonkeyPatch.context() as patch:
        patch.setattr("casemate.training.loop._Run._close_epoch", _raising_in_epoch(2, Died))
        patch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
        run(FGSMRS(**options), made, checkpoints=tmp_path)
    resumed = run(FGSMRS(**options), made, checkpoints=tmp_path)
    assert same(weights(resumed), weights(straight)) and resumed.curves == straight.curves


def _raising_in_epoch(epoch: int, error: type[Exception]) -> Any:
    from casemate.training.loop import _Run

    whole = _Run._close_epoch

    def close(self: Any, *, last: bool) -> None:
        if self.epoch == epoch:
            raise error
        whole(self, last=last)

    return close
