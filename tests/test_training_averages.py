"""Averaged weights and their batch norms: three ways to have running statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registry_toys
import torch
from torch import Tensor, nn
from training_toys import SHAPE, Noisy, Plain, batch_norm_net, data, linear, recipe, run, same, task, weights

from casemate import registry
from casemate.fields import spec
from casemate.seeding import derive
from casemate.trainable import Context
from casemate.training.validation import validate

MADE: dict[str, Any] = {"epochs": 3, "ema": 0.9, "momentum": 0.9}
WAYS = ("reestimated", "averaged", "live")


@spec
class Ending(Plain):
    """Keeps what the live network is at the end of each epoch."""

    ends: Any = None

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        self.ends.append({k: v.clone() for k, v in ctx.modules["classifier"].state_dict().items()})


def statistics(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if "running" in key}


def others(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if "running" not in key}


def test_the_weights_are_the_same_and_the_statistics_are_not() -> None:
    live: dict[str, Any] = {way: [] for way in WAYS}
    made = {
        way: weights(run(Ending(ends=live[way]), recipe(**MADE, ema_statistics=way), network=batch_norm_net))
        for way in WAYS
    }
    for one, other in (("reestimated", "averaged"), ("averaged", "live"), ("live", "reestimated")):
        assert same(others(made[one]), others(made[other]))
        assert not same(statistics(made[one]), statistics(made[other]))
        assert all(same(a, b) for a, b in zip(live[one], live[other], strict=True)), "training is the same run"
    assert same(statistics(made["live"]), statistics(live["live"][-1]))
    assert weights(run(Plain(), recipe(**MADE), network=batch_norm_net))["1.num_batches_tracked"] == 12


@pytest.mark.parametrize("samples", [40, 47, 600])
def test_statistics_are_means_over_batches_of_what_the_averaged_weights_see(samples: int) -> None:
    """Of all whole batches, or of 50 of them."""
    trained = run(Plain(), recipe(**{**MADE, "epochs": 2}), network=batch_norm_net, samples=data(samples))
    classifier = trained.modules["classifier"]
    assert isinstance(classifier, nn.Sequential)
    shown = data(samples).batches(10, seed=derive(0, "statistics", trained.steps), epoch=0, drop_last=True)
    with torch.no_grad():
        codes = [classifier[0](x) for x, _, _ in shown][:50]
    assert len(codes) == min(50, samples // 10)
    means = torch.stack([code.mean((0, 2, 3)) for code in codes]).mean(0)
    variances = torch.stack([code.transpose(0, 1).flatten(1).var(1) for code in codes]).mean(0)
    torch.testing.assert_close(classifier[1].running_mean, means)
    torch.testing.assert_close(classifier[1].running_var, variances)
    assert classifier[1].momentum == 0.1 and not classifier.training


def test_what_is_measured_and_selected_has_them() -> None:
    held_out, made = data(30, 1), recipe(**{**MADE, "epochs": 5, "lr": 0.5}, select="best")
    trained = run(Plain(), made, network=batch_norm_net, val_data=held_out)
    row = next(row for row in trained.curves if row["epoch"] == trained.chosen_epoch)
    found = validate(
        Plain(), task(made, batch_norm_net), trained.modules, held_out, seed=0, device=torch.device("cpu"),
        between=lambda: None,
    )  # fmt: skip
    assert found == {key: row[key] for key in found}


@pytest.mark.parametrize("way", WAYS)
def test_without_batch_norm_there_is_one_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no step is made for it."""
    monkeypatch.setattr("casemate.training.loop.rehearse", lambda *_, **__: pytest.fail("nothing to find"))
    held_out = data(30, 1)
    made = run(Noisy(), recipe(**MADE, ema_statistics=way), network=linear, val_data=held_out)
    usual = run(Noisy(), recipe(**MADE, ema_statistics="averaged"), network=linear, val_data=held_out)
    assert same(weights(made), weights(usual)) and made.curves == usual.curves


def test_measuring_more_often_changes_no_bit() -> None:
    """Noisy draws from every stream and carries state: what finds the statistics uses copies of all of it."""
    seldom, often = (
        run(Noisy(), recipe(**MADE, validate_every=every), network=batch_norm_net, val_data=data(30, 1))
        for every in (0, 1)
    )
    assert same(weights(seldom), weights(often))
    assert [row["loss"] for row in seldom.curves] == [row["loss"] for row in often.curves]


def test_a_run_broken_off_between_its_last_step_and_its_end_has_the_same_ones(tmp_path: Path) -> None:
    """The checkpoint before holds the statistics of the epoch before; they are found anew."""

    class Died(Exception):
        pass

    def die(self: Any, *, last: bool) -> None:
        if self.epoch == 2:
            raise Died
        whole(self, last=last)

    from casemate.training.loop import _Run

    whole = _Run._close_epoch
    made = recipe(**MADE)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
        patch.setattr(_Run, "_close_epoch", die)
        run(Noisy(), made, network=batch_norm_net, checkpoints=tmp_path)
    resumed = run(Noisy(), made, network=batch_norm_net, checkpoints=tmp_path)
    assert same(weights(resumed), weights(run(Noisy(), made, network=batch_norm_net)))


@pytest.mark.parametrize("name", [name for name in registry.names("defense") if name != "given"])
def test_every_defense_can_be_rehearsed_and_learns_nothing_from_it(name: str) -> None:
    """Weights of every module are those of a run that averages its statistics; somewhere a statistic is another."""
    method = registry_toys.toy(name)
    found, averaged = (
        registry_toys.run(method, recipe(epochs=2, batch_size=8, ema=0.9, ema_statistics=way))
        for way in ("reestimated", "averaged")
    )
    for part in averaged.modules:
        assert same(others(weights(found, part)), others(weights(averaged, part)))
    assert any(
        not torch.equal(value, weights(averaged, part)[key])
        for part in averaged.modules for key, value in statistics(weights(found, part)).items()
    )  # fmt: skip
    assert all(torch.isfinite(v).all() for part in found.modules for v in weights(found, part).values())


def test_a_rehearsal_is_of_whole_batches_in_train_mode() -> None:
    seen: list[tuple[tuple[int, ...], bool]] = []

    @spec
    class Counting(Noisy):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Any:
            seen.append((tuple(x.shape), ctx.modules["classifier"].training))
            yield from super().step(ctx, x, y)

    run(Counting(), recipe(ema=0.9), network=batch_norm_net, samples=data(45))
    assert seen == [((10, *SHAPE), True)] * 4 + [((5, *SHAPE), True)] + [((10, *SHAPE), True)] * 4
