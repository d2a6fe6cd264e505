"""Steps as CUDA graphs. On the CPU a tape stands in for the GPU's capture: it repeats the same operations on the same
memory, so whatever a graph would have baked in wrongly shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.base import Defense
from casemate.defenses.fgsm_rs import FGSMRS
from casemate.defenses.free import Free
from casemate.defenses.trades import TRADES
from casemate.fields import spec
from casemate.trainable import Context, Moment, Update
from casemate.training import graphs
from casemate.training.loop import Trained
from tests.tape import CPU
from tests.training_toys import CLASSES, data, recipe, run, same, weights


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Captures on the CPU; one entry a graph, the number of its replays."""
    made: list[int] = []

    class Counting(CPU):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            replay, number = super().capture(work), len(made)
            made.append(0)

            def counted() -> None:
                made[number] += 1
                replay()

            return counted

    monkeypatch.setitem(graphs.BACKENDS, "cpu", Counting)
    return made


def network() -> nn.Module:
    """Batch norm and dropout: both move with every pass."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def equal(one: Trained, other: Trained) -> bool:
    """Weights and curves, to the last bit; but a graph reads its learning rate in float32."""
    rows = [[{k: v for k, v in row.items() if v == v and k != "lr"} for row in t.curves] for t in (one, other)]
    return same(weights(one), weights(other)) and rows[0] == rows[1]


RECIPE = {
    "epochs": 4, "lr": 0.05, "momentum": 0.9, "schedule": "cyclic", "warmup": 0.3, "ema": 0.9, "max_grad_norm": 1.0,
}  # fmt: skip
METHODS = [
    (ATPGD(steps=2), {}),
    (ATPGD(steps=2), {"fold_norms": True}),
    (ATPGD(steps=2, bn_mode_attack="train_update"), {"optimizer": "adam", "weight_decay": 0.01}),
    (TRADES(steps=2), {"awp": 0.01, "awp_warmup": 0.4}),
    (FGSMRS(init="previous", alarm_after=1), {}),
    (FGSMRS(early_stop=True), {}),
    (Free(replays=2), {}),
]


@pytest.mark.parametrize(("method", "changes"), METHODS, ids=lambda v: type(v).__name__ if v else "")
def test_a_captured_run_is_the_same_run_to_the_last_bit(method: Any, changes: Any, replays: list[int]) -> None:
    plain, captured = (
        run(method, recipe(**{**RECIPE, **changes}, cuda_graph=flag), network=network, val_data=data(20, seed=1))
        for flag in (False, True)
    )
    assert sum(replays) >= 6, f"most of {captured.steps} steps were repeated: {replays}"
    if changes.get("optimizer") == "adam":  # divides its rate, which a graph has in float32, by what it corrects
        for key, value in weights(plain).items():
            torch.testing.assert_close(weights(captured)[key], value, rtol=1e-3, atol=1e-4)
    else:
        assert equal(plain, captured)


def test_a_radius_that_grows_is_not_captured_before_it_stands(replays: list[int]) -> None:
    made = [
        run(ATPGD(steps=4, ramp=0.5, plan=((0.75, 2),)), recipe(**RECIPE, cuda_graph=bool(f)), network=network)
        for f in (0, 1)
    ]
    assert equal(*made)
    assert replays == [1, 1], "after three steps each of the last radius and, from 0.75 of 16 steps on, of two steps"


def test_a_ragged_last_batch_has_a_graph_of_its_own_or_none(replays: list[int]) -> None:
    made = [
        run(ATPGD(steps=1), recipe(**{**RECIPE, "epochs": 6}, cuda_graph=bool(f)), network=network, samples=data(34))
        for f in (0, 1)
    ]
    assert equal(*made)
    assert sum(replays) > 12


def test_what_compares_the_fraction_is_captured_on_either_side(replays: list[int]) -> None:
    @spec
    class Switch(Defense):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            sign = 1.0 if ctx.fraction < 0.5 else -0.1
            yield Update(("classifier",), lambda: sign * F.cross_entropy(ctx.modules["classifier"](x), y))

    made = [run(Switch(), recipe(**RECIPE, cuda_graph=bool(f)), network=network) for f in (0, 1)]
    assert equal(*made)
    assert len(replays) == 2 and min(replays) > 1


class Reads(Defense):
    """Uses how far training is in a way that a repeated step could not know."""

    how = "product"

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        weight: Any = {
            "product": lambda: 2 * ctx.fraction, "tensor": lambda: torch.ones(()) * ctx.fraction,
            "step": lambda: float(ctx.step % 3), "epoch": lambda: 1.0 if ctx.epoch > 1 else 0.5,
        }[self.how]()  # fmt: skip
        yield Update(("classifier",), lambda: weight * F.cross_entropy(ctx.modules["classifier"](x), y))


@pytest.mark.parametrize("how", ["product", "tensor", "step", "epoch"])
def test_what_a_graph_could_not_know_runs_as_it_is_and_says_so_once(
    how: str, replays: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reads, "how", how)
    made = [run(Reads(), recipe(**RECIPE, cuda_graph=flag), network=network) for flag in (False, True)]
    assert equal(*made) and not replays
    assert capsys.readouterr().err.count("depends on how far training is") == 1


def test_a_step_that_waits_for_the_device_runs_as_it_is(
    replays: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    @spec
    class Waits(Defense):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            scale = 1 / max(float(x.amax()), 0.1)
            yield Update(("classifier",), lambda: F.cross_entropy(ctx.modules["classifier"](scale * x), y))

    made = [run(Waits(), recipe(**RECIPE, cuda_graph=flag), network=network) for flag in (False, True)]
    assert equal(*made) and not replays
    said = capsys.readouterr().err
    assert said.count("it cannot be captured (operation not permitted while capturing") == 1


def test_a_method_that_says_it_cannot_be_captured_is_not(
    replays: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    class Never(ATPGD):
        capturable = False

    run(Never(steps=1), recipe(**RECIPE, cuda_graph=True), network=network)
    assert not replays and "depends on values on the device" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    made = [run(ATPGD(steps=1), recipe(**RECIPE, cuda_graph=flag), network=network) for flag in (False, True)]
    assert equal(*made)
    assert capsys.readouterr().err.count("there is no GPU here") == 1


def test_a_captured_run_resumes_bit_for_bit(replays: list[int], tmp_path: Path) -> None:
    class Stops(ATPGD):
        at = 0

        def epoch_end(self, ctx: Context, validate: Any) -> None:
            if ctx.epoch == type(self).at:
                raise KeyboardInterrupt

    made = recipe(**RECIPE, cuda_graph=True)
    Stops.at = 9
    whole = run(Stops(steps=1), made, network=network)
    Stops.at = 2
    with pytest.raises(KeyboardInterrupt):
        run(Stops(steps=1), made, network=network, checkpoints=tmp_path)
    Stops.at = 9
    again = run(Stops(steps=1), made, network=network, checkpoints=tmp_path)
    assert equal(whole, again)


def test_noise_of_the_device_is_another_draw_that_repeats_itself(replays: list[int]) -> None:
    made = {**RECIPE, "noise": "device"}
    one, other = (run(ATPGD(steps=1), recipe(**made, cuda_graph=flag), network=network) for flag in (False, True))
    assert equal(one, other) and replays
    assert not equal(one, run(ATPGD(steps=1), recipe(**RECIPE), network=network))


def test_a_moment_tells_for_how_long_it_holds() -> None:
    moment = Moment(0.4)
    assert moment.depends(lambda at: min(1.0, at / 0.3)) == 1.0 and not moment > 0.6
    assert moment.holds(0.5) and not moment.holds(0.2) and not moment.holds(0.7)
    assert moment + 1 == 1.4 and not moment.holds(0.4), "what is done with the sum is not known"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("method", "changes"), METHODS, ids=lambda v: type(v).__name__ if v else "")
def test_a_gpu_captures_and_gives_the_same_run(method: Any, changes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for flag in (False, True):
        samples = data()
        resident = type(samples)(_images(samples), "cuda")
        made.append(
            run(
                method,
                recipe(**{**RECIPE, **changes}, cuda_graph=flag),
                network=network,
                samples=resident,
                device="cuda",
            )
        )
    assert "cuda_graph" not in capsys.readouterr().err
    for key, value in weights(made[0]).items():
        torch.testing.assert_close(weights(made[1])[key], value, rtol=1e-2, atol=1e-3)


def _images(samples: Any) -> Any:
    from casemate.data.base import Images

    return Images(samples.images.permute(0, 2, 3, 1).numpy(), samples.labels.numpy())
