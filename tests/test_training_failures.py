"""A run that is killed, that fills the disk or that breaks down: what is kept, what is said, and how it goes on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_toys import CLASSES, Plain, batch_norm_net, data, linear, recipe, run, same, weights

from casemate.attacks.advgan import AdvGANTrainer
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.base import Defense
from casemate.errors import UserError
from casemate.fields import Count, spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task, Update
from casemate.training.checkpoint import Checkpoints
from casemate.training.loop import Trained, train
from casemate.training.snapshot import under

HERE = Path(__file__).resolve().parent

# --- killed: a pair of networks ---------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from casemate.training import loop
from test_training_failures import fit_pair
loop.SAVE_SECONDS = 0.0  # after every batch
fit_pair(checkpoints=Path(sys.argv[1]))
"""


@spec
class DyingPair(AdvGANTrainer):
    """The project's generator and critic, killed between the two updates of a step."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        for update in super().step(ctx, x, y):
            yield update
            if os.environ.get("TOY_DIES_AT") == str(ctx.step):
                os.kill(os.getpid(), signal.SIGKILL)


def fit_pair(**changes: Any) -> Trained:
    draw = np.random.default_rng(0)
    images = Images(draw.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), np.arange(40) % CLASSES)
    torch.manual_seed(0)
    victim = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    made = recipe(epochs=3, optimizer="adam", lr=0.01)
    of_task = Task((1, 8, 8), CLASSES, ThreatModel("linf", 0.1), linear, made.player, victim=victim)
    pair = DyingPair(width=2, blocks=1)
    return train(pair, of_task, DeviceData(images), None, made, seed=0, device="cpu", **changes)


def test_a_pair_killed_between_its_updates_goes_on_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**os.environ, "TOY_DIES_AT": "6", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    resumed = fit_pair(checkpoints=tmp_path)
    assert "resumed after step 6 of 12" in capsys.readouterr().err
    straight = fit_pair()
    for name in ("generator", "critic"):
        assert same(weights(resumed, name), weights(straight, name))
    assert resumed.curves == straight.curves and set(straight.curves[0]) >= {"loss", "loss_critic", "fooled"} - {
        "loss"
    }


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_the_middle_keeps_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    @spec
    class Filling(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            if ctx.step == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            yield from super().step(ctx, x, y)

    try:
        with pytest.raises(OSError) as caught:
            run(Filling(), recipe(epochs=3), network=batch_norm_net, checkpoints=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert Path(caught.value.filename).is_relative_to(tmp_path), "the message can name the disk"
    monkeypatch.setattr(Filling, "step", Plain.step)
    resumed = run(Filling(), recipe(epochs=3), network=batch_norm_net, checkpoints=tmp_path)
    assert "resumed after step 7 of 12" in capsys.readouterr().err
    assert same(weights(resumed), weights(run(Plain(), recipe(epochs=3), network=batch_norm_net)))


def test_checkpoints_that_cannot_be_written_are_an_error_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot write checkpoints to .*file.*give a folder"):
            run(Plain(), recipe(), checkpoints=where)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_result_that_cannot_be_written_is_not_lost(tmp_path: Path) -> None:
    def full(trained: Trained) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    with pytest.raises(OSError, match="No space left"):
        run(Plain(), recipe(epochs=2), checkpoints=tmp_path, save=full)
    saved: list[Trained] = []
    run(Plain(), recipe(epochs=2), checkpoints=tmp_path, save=saved.append)
    assert same(weights(saved[0]), weights(run(Plain(), recipe(epochs=2)))) and not list(tmp_path.iterdir())


# --- numbers that are none --------------------------------------------------------------------------------------


@spec
class Duel(Defense):
    """A second player whose loss overflows at one step."""

    at: Count = 6
    value: str = "inf"

    def modules(self, task: Task) -> dict[str, nn.Module]:
        return {"classifier": task.network(), "critic": nn.Linear(16, 1)}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        return {name: task.player(module.parameters()) for name, module in modules.items()}

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        factor = float(self.value) if ctx.step == self.at else 1.0
        yield Update(("classifier",), lambda: F.cross_entropy(ctx.modules["classifier"](x), y))
        yield Update(("critic",), lambda: factor * (1 + ctx.modules["critic"](x.flatten(1)).square().mean()))


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_the_player_that_breaks_down_is_named_and_the_checkpoint_is_from_before(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(Duel(value=value), recipe(epochs=3), checkpoints=tmp_path)
    said = str(caught.value)
    assert "epoch 1.5, step 6" in said and f"player critic is {value}" in said and "last good checkpoint" in said
    (folder,) = tmp_path.iterdir()
    assert str(folder) in said
    store = Checkpoints(tmp_path, {})
    store.folder = folder  # of an identity that the test need not spell out
    found = store.load()
    assert found is not None and found[1]["at"] == [1, 0, 4], "the end of the first epoch"
    good = run(Duel(value="1.0"), recipe(epochs=1))
    kept = under("module", found[0])
    for name in ("classifier", "critic"):
        for key, tensor in weights(good, name).items():
            assert torch.equal(kept[f"{name}/{key}"], tensor)


def test_nothing_is_kept_of_a_run_without_checkpoints() -> None:
    with pytest.raises(UserError) as caught:
        run(Duel(at=1), recipe())
    assert "checkpoint" not in str(caught.value)


# --- precision, memory format, compilation ----------------------------------------------------------------------


def curve(network: Callable[[], nn.Module], **changes: Any) -> Trained:
    return run(Plain(), recipe(epochs=6, lr=0.1, **changes), network=network, val_data=data(30, seed=1))


def convolutional() -> nn.Module:
    """Batch norm and no dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def test_the_memory_format_changes_nothing_but_rounding() -> None:
    one, other = (curve(convolutional, channels_last=flag) for flag in (True, False))
    layout = [
        m.modules["classifier"][3].weight.is_contiguous(memory_format=torch.channels_last) for m in (one, other)
    ]  # type: ignore[index]
    assert layout == [True, False]
    for key, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[key], rtol=1e-3, atol=1e-4)
    assert one.curves[-1]["val_clean"] == other.curves[-1]["val_clean"]


def test_bf16_follows_float32() -> None:
    exact, rounded = (curve(convolutional, precision=p) for p in ("fp32", "bf16"))
    losses = [(a["loss"], b["loss"]) for a, b in zip(exact.curves, rounded.curves, strict=True)]
    assert exact.curves[-1]["loss"] < 0.3 * exact.curves[0]["loss"]
    assert all(abs(a - b) < 0.03 for a, b in losses), losses
    assert any(a != b for a, b in losses), "it did round"
    assert abs(exact.curves[-1]["val_clean"] - rounded.curves[-1]["val_clean"]) < 0.07


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile to the traced graphs themselves, which takes a second; what was traced is told."""
    traced: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr("casemate.training.compiled.OPTIONS", {"backend": backend})
    torch._dynamo.reset()
    return traced


def test_a_compiled_run_is_the_same_run(eager: list[Any]) -> None:
    plain = curve(convolutional)
    assert not eager
    fast = curve(convolutional, compile=True)
    assert eager, "something was compiled"
    assert fast.modules["classifier"]._compiled_call_impl is None, "what comes out is plain"
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(fast)[key], value, rtol=1e-4, atol=1e-5)
    assert [row["val_robust"] for row in fast.curves] == [row["val_robust"] for row in plain.curves]


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler here")

    monkeypatch.setattr("casemate.training.compiled.OPTIONS", {"backend": backend})
    torch._dynamo.reset()
    trained = curve(convolutional, compile=True)
    said = capsys.readouterr().err
    assert (
        said.count("warning: classifier could not be compiled and runs as it is") == 1 and "no compiler here" in said
    )
    assert same(weights(trained), weights(curve(convolutional)))


def test_a_method_that_cannot_be_compiled_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @spec
    class Twice(Plain):
        """The gradient of a gradient, as a gradient penalty has it."""

        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            def loss() -> Tensor:
                at = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(ctx.modules["classifier"](at).square().sum(), at, create_graph=True)
                return slope.square().mean()

            yield Update(("classifier",), loss)

    monkeypatch.setattr("casemate.training.compiled.OPTIONS", {"backend": "aot_eager"})
    torch._dynamo.reset()
    with pytest.raises(UserError, match="this method cannot be compiled: set compile: false"):
        run(Twice(), recipe(compile=True), network=convolutional)
    run(Twice(), recipe(), network=convolutional)


def test_an_error_of_the_method_itself_stays_what_it_is(eager: list[Any]) -> None:
    @spec
    class Wrong(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            raise RuntimeError("its own")
            yield

    with pytest.raises(RuntimeError, match="its own"):
        run(Wrong(), recipe(compile=True))


@pytest.mark.slow
def test_the_real_compiler_gives_the_same_run() -> None:
    torch._dynamo.reset()
    plain, fast = (run(Plain(), recipe(epochs=2, compile=c), network=batch_norm_net) for c in (False, True))
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(fast)[key], value, rtol=1e-3, atol=1e-4)
