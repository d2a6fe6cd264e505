"""The loop: budgets, replays, averages, validation, early stop, precision, and what it says when things break."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_toys import SHAPE, Plain, batch_norm_net, data, linear, recipe, run, same, weights

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.errors import UserError
from casemate.fields import Count, spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task, Update
from casemate.training.artifact import save_artifact
from casemate.training.precision import autocast, choose, exact, has_bf16
from casemate.training.recorder import ListRecorder
from casemate.training.validation import validate

CPU = torch.device("cpu")


@spec
class Watching(Plain):
    """Plain, telling the test about every step."""

    see: Any = None
    at_epoch_end: Any = None

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield from super().step(ctx, x, y)
        if self.see is not None:
            self.see(ctx, x, y)

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        if self.at_epoch_end is not None:
            self.at_epoch_end(ctx, validate)


@spec
class Replayed(Watching):
    replays: Count = 4

    @property
    def updates_per_batch(self) -> int:
        return self.replays


def test_it_equals_a_hand_written_loop() -> None:
    made = recipe(epochs=3, momentum=0.9, nesterov=True, weight_decay=0.01, schedule="trapezoid", warmup=0.25)
    start: dict[str, Any] = {}

    def network() -> nn.Module:
        net = linear()
        start.update({k: v.clone() for k, v in net.state_dict().items()})
        return net

    trained = run(Plain(), made, network=network)
    net = linear()
    net.load_state_dict(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step in range(12):
        batches = list(data().batches(10, seed=0, epoch=step // 4))
        x, y, _ = batches[step % 4]
        optimizer.param_groups[0]["lr"] = 0.1 * made.factor((step + 0.5) / 12)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(weights(trained)[key], value, rtol=0, atol=1e-6)
    assert trained.curves[-1]["lr"] == pytest.approx(0.1 * made.factor(11.5 / 12))


def test_training_learns_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained = run(Plain(), recipe(epochs=20, lr=0.5), val_data=data(30, seed=1))
    assert torch.equal(torch.rand(3), expected)
    assert trained.curves[-1]["val_clean"] > 0.9 and trained.curves[-1]["loss"] < trained.curves[0]["loss"]
    assert not trained.modules["classifier"].training


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    one, two, other = (weights(run(Plain(), recipe(), seed=s)) for s in (0, 0, 1))
    assert same(one, two) and not same(one, other)


@pytest.mark.parametrize(
    ("epochs", "steps", "rows"), [(0.5, 2, [0.5]), (2.25, 9, [1, 2, 2.25]), (0.01, 1, [0.25]), (1, 4, [1])]
)
def test_a_fractional_budget_ends_inside_an_epoch(epochs: float, steps: int, rows: list[float]) -> None:
    fractions: list[float] = []
    trained = run(Watching(see=lambda ctx, x, y: fractions.append(ctx.fraction)), recipe(epochs=epochs))
    assert (trained.steps, trained.epochs) == (steps, steps / 4)
    assert [row["epoch"] for row in trained.curves] == rows
    assert fractions == [i / steps for i in range(steps)]


def test_replays_show_each_batch_again_and_divide_the_passes() -> None:
    seen: list[tuple[int, int, float, Tensor]] = []
    method = Replayed(see=lambda ctx, x, y: seen.append((ctx.step, ctx.epoch, ctx.fraction, ctx.indices)))
    trained = run(method, recipe(epochs=8))  # 4 batches: 32 updates are 8 batches of 4 replays are 2 passes
    assert (trained.steps, trained.epochs, len(trained.curves)) == (32, 8, 2)
    assert [s[0] for s in seen] == list(range(32)) and [s[1] for s in seen] == [0] * 16 + [1] * 16
    groups = [torch.stack([s[3] for s in seen[i : i + 4]]) for i in range(0, 32, 4)]
    assert all((g == g[0]).all() for g in groups) and not torch.equal(groups[0], groups[1])
    assert [row["epoch"] for row in trained.curves] == [4, 8]


@pytest.mark.parametrize("copied", [0, 3])
def test_the_moving_average_is_exact_buffers_included(copied: int) -> None:
    """After `copied` steps, whose weights it has as they are."""
    history: list[dict[str, Tensor]] = []

    def see(ctx: Context, x: Tensor, y: Tensor) -> None:
        history.append({k: t.clone() for k, t in ctx.modules["classifier"].state_dict().items()})

    start: dict[str, Tensor] = {}

    def network() -> nn.Module:
        net = batch_norm_net()
        start.update({k: t.clone() for k, t in net.state_dict().items()})
        return net

    made = recipe(epochs=2, ema=0.3, ema_statistics="averaged", ema_warmup=copied / 8)
    trained = run(Watching(see=see), made, network=network)
    average = {k: t.double() for k, t in start.items()}
    for t, after in enumerate(history, 1):
        s = t - copied
        decay = min(0.3, (1 + s) / (10 + s)) if s > 0 else 0  # 2/11, 3/12, 0.3 from the third step on
        for key, value in after.items():
            average[key] = value.double() if "num_batches" in key else decay * average[key] + (1 - decay) * value
    assert len(history) == 8
    for key, value in weights(trained).items():
        torch.testing.assert_close(value.double(), average[key], rtol=0, atol=1e-6)
    assert weights(trained)["1.num_batches_tracked"] == 8


def validated(net: nn.Module, classes: int, held_out: DeviceData) -> dict[str, float]:
    of_task = Task(SHAPE, classes, ThreatModel("linf", 0.1), lambda: net, recipe().player)
    modules = {"classifier": net}
    return validate(Plain(), of_task, modules, held_out, seed=0, device=CPU, between=lambda: None)


def test_validation_finds_the_worst_case_of_a_linear_network() -> None:
    """Two classes, one score: the worst point moves every pixel by the radius against its weight, up to the box."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (600, 4, 4, 1), dtype=np.uint8)
    held_out = DeviceData(Images(images, draw.integers(0, 2, 600)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    x, y = held_out.x(torch.arange(600)), held_out.labels
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)  # the boundary goes through the middle of the data
        towards = (net[1].weight[1] - net[1].weight[0]).view(1, *SHAPE).sign()
        sign = torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1)
        right = net(x).argmax(1) == y
        robust = right & (net((x + 0.1 * sign * towards).clamp(0, 1)).argmax(1) == y)
    assert 0.1 < robust.float().mean() < right.float().mean() < 0.9
    found = validated(net, 2, held_out)
    assert found == {"val_clean": int(right.sum()) / 600, "val_robust": int(robust.sum()) / 600}


def test_a_clean_error_is_never_robust() -> None:
    class WrongOnlyAtTheImage(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            moved = ((x.mean((1, 2, 3)) - 0.4).abs() > 1e-5).float() + 0 * x.sum()
            return torch.stack([1 - moved, moved], 1)

    images = np.full((4, 4, 4, 1), 102, dtype=np.uint8)  # 0.4
    found = validated(WrongOnlyAtTheImage(), 2, DeviceData(Images(images, np.array([1, 1, 0, 0]))))
    assert found == {"val_clean": 0.5, "val_robust": 0.0}


def test_validation_every_other_epoch_and_the_last() -> None:
    rows = run(Plain(), recipe(epochs=5, validate_every=2), val_data=data(30, 1)).curves
    assert ["val_clean" in row for row in rows] == [False, True, False, True, True]
    rows = run(Plain(), recipe(epochs=3, validate_every=0), val_data=data(30, 1)).curves
    assert ["val_robust" in row for row in rows] == [False, False, True]
    assert "val_clean" not in run(Plain(), recipe()).curves[0]


def test_validation_does_not_disturb_training() -> None:
    quiet = run(Plain(), recipe(epochs=2), network=batch_norm_net)
    watched = run(Plain(), recipe(epochs=2), network=batch_norm_net, val_data=data(30, 1))
    assert same(weights(quiet), weights(watched))


def test_the_best_epoch_is_kept_when_training_gets_worse() -> None:
    kept: list[dict[str, Tensor]] = []

    @spec
    class Turning(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            sign = 1 if ctx.epoch < 6 else -1
            yield Update(("classifier",), lambda: sign * F.cross_entropy(ctx.modules["classifier"](x), y))

        def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
            kept.append({k: t.clone() for k, t in ctx.modules["classifier"].state_dict().items()})

    trained = run(Turning(), recipe(epochs=11, lr=0.05, select="best"), val_data=data(30, 1))
    scores = [row["val_robust"] for row in trained.curves]
    best = scores.index(max(scores))
    assert trained.chosen_epoch == best + 1 and scores[-1] < scores[best]
    assert same(weights(trained), kept[best])
    with pytest.raises(UserError, match="select: best needs a validation split"):
        run(Plain(), recipe(select="best"))


def test_early_stop_ends_the_run_with_a_validation() -> None:
    seen: list[dict[str, float]] = []

    def stop(ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        if ctx.epoch == 1:
            seen.append(validate())
            ctx.stop = True

    trained = run(Watching(at_epoch_end=stop), recipe(epochs=9, validate_every=0), val_data=data(30, 1))
    assert (trained.epochs, trained.steps, len(trained.curves)) == (2, 8, 2)
    assert seen[0] == {k: trained.curves[-1][k] for k in ("val_clean", "val_robust")}


@pytest.mark.parametrize(("stop_at", "chosen"), [(3, 2), (None, 5)])
def test_a_run_that_is_stopped_falls_back_on_the_weights_last_kept(
    stop_at: int | None, chosen: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the moving average, since that is the result; a run that is not stopped ends with its last weights."""
    made = recipe(epochs=5, ema=0.5)

    def mark(ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        ctx.keep = ctx.epoch in (0, 1)
        ctx.stop = ctx.epoch == stop_at
        if ctx.stop:
            ctx.note("stopped by the test")

    trained = run(Watching(at_epoch_end=mark), made)
    assert ("stopped by the test" in capsys.readouterr().err) == (stop_at is not None)
    assert trained.chosen_epoch == chosen and trained.epochs == (5 if stop_at is None else 4)
    assert same(weights(trained), weights(run(Plain(), recipe(epochs=chosen, ema=0.5))))


def test_the_best_epoch_goes_before_the_one_kept() -> None:
    def mark(ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        ctx.keep, ctx.stop = True, ctx.epoch == 4

    trained = run(Watching(at_epoch_end=mark), recipe(epochs=9, lr=2.0, select="best"), val_data=data(30, 1))
    scores = [row["val_robust"] for row in trained.curves]
    assert trained.chosen_epoch == scores.index(max(scores)) + 1 < 5


def test_logs_are_means_over_the_steps_and_reach_the_recorder() -> None:
    losses: list[float] = []

    def see(ctx: Context, x: Tensor, y: Tensor) -> None:
        ctx.log(step=ctx.step, halves=torch.tensor(0.5) * ctx.step)
        losses.append(ctx.step)

    recorder = ListRecorder()
    trained = run(Watching(see=see), recipe(epochs=2), recorder=recorder)
    assert [row["step"] for row in trained.curves] == [1.5, 5.5]
    assert [row["halves"] for row in trained.curves] == [0.75, 2.75]
    assert recorder.rows() == [(1, trained.curves[0]), (2, trained.curves[1])]


def test_a_log_that_is_no_number_costs_its_place_in_the_row_and_nothing_else(tmp_path: Path) -> None:
    def see(ctx: Context, x: Tensor, y: Tensor) -> None:
        ctx.log(far=x[x > 2].mean(), step=ctx.step)

    trained = run(Watching(see=see), recipe(epochs=2))
    assert [sorted(row) for row in trained.curves] == [["epoch", "loss", "lr", "step"]] * 2
    save_artifact(tmp_path, trained.modules, {"metrics": trained.curves[-1]})


def test_a_method_may_put_its_modules_in_eval_mode_and_the_next_step_trains_again() -> None:
    modes: list[bool] = []

    @spec
    class Evaluating(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            modes.append(ctx.modules["classifier"][1].training)  # type: ignore[index]
            ctx.modules["classifier"].eval()
            yield from super().step(ctx, x, y)

    run(Evaluating(), recipe(), network=batch_norm_net)
    assert modes == [True] * 4


def test_augmentation_is_off_unless_the_recipe_says_so() -> None:
    def images(**changes: Any) -> Tensor:
        seen: list[Tensor] = []
        run(Watching(see=lambda ctx, x, y: seen.append(x)), recipe(**changes), pad=1, flip=True)
        return torch.cat(seen)

    plain, moved = images(), images(augment=True)
    assert torch.equal(plain.flatten(1).sum(1).sort()[0], data().x(torch.arange(40)).flatten(1).sum(1).sort()[0])
    assert not torch.equal(plain, moved)


# --- precision ----------------------------------------------------------------------------------------------------


def test_bf16_computes_the_loss_in_bf16_and_keeps_float32_weights() -> None:
    seen: set[torch.dtype] = set()

    @spec
    class Typed(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            def loss() -> Tensor:
                logits = ctx.modules["classifier"](x)
                seen.add(logits.dtype)
                return F.cross_entropy(logits.float(), y)

            with ctx.autocast():
                seen.add(ctx.modules["classifier"](x).dtype)
            yield Update(("classifier",), loss)

    made = recipe(epochs=10, lr=0.5, precision="bf16")
    trained = run(Typed(), made, val_data=data(30, 1))
    assert seen == {torch.bfloat16} and trained.precision == "bf16"
    assert all(t.dtype == torch.float32 for t in weights(trained).values())
    assert trained.curves[-1]["val_clean"] > 0.8
    seen.clear()
    assert run(Typed(), recipe(precision="auto")).precision == "fp32", "a small network stays in float32 on a CPU"
    assert seen == {torch.float32}


def test_a_player_may_insist_on_float32() -> None:
    seen: list[torch.dtype] = []

    @spec
    class Careful(Plain):
        def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
            return {"classifier": task.player(modules["classifier"].parameters(), precision="fp32")}

        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            def loss() -> Tensor:
                logits = ctx.modules["classifier"](x)
                seen.append(logits.dtype)
                return F.cross_entropy(logits, y)

            yield Update(("classifier",), loss)

    run(Careful(), recipe(precision="bf16"))
    assert set(seen) == {torch.float32}


def test_auto_is_bf16_only_for_a_large_network_on_hardware_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = nn.Linear(100, 100), nn.Linear(1000, 1000)
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("casemate.training.precision.has_bf16", lambda device, s=supported: s)
        assert choose("auto", CPU, [small]) == "fp32"
        assert choose("auto", CPU, [large]) == expected
        assert choose("bf16", CPU, [small]) == "bf16"
    monkeypatch.undo()
    if Path("/proc/cpuinfo").exists():
        flags = Path("/proc/cpuinfo").read_text()
        assert has_bf16(CPU) == ("avx512_bf16" in flags or "amx_tile" in flags)


def test_exact_switches_an_outer_autocast_off() -> None:
    x = torch.ones(4, 4)
    with autocast("bf16", CPU):
        assert (x @ x).dtype == torch.bfloat16
        with exact(CPU):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


# --- what goes wrong ----------------------------------------------------------------------------------------------


@spec
class Exploding(Plain):
    at: Count = 6

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        factor = float("nan") if ctx.step == self.at else 1.0
        yield Update(("classifier",), lambda: factor * F.cross_entropy(ctx.modules["classifier"](x), y))


def test_a_nan_loss_names_epoch_step_player_and_mend_and_keeps_the_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(UserError) as caught:
        run(Exploding(), recipe(epochs=9), checkpoints=tmp_path)
    said = str(caught.value)
    assert "epoch 1.5, step 6" in said and "player classifier is nan" in said and "lower lr" in said
    assert "fp32" not in said and "\n" not in said
    assert str(tmp_path) in said and len(list(tmp_path.glob("*/*.safetensors"))) == 1, "of epoch 1"
    with pytest.raises(UserError, match="precision: fp32"):
        run(Exploding(), recipe(epochs=9, precision="bf16"))


def test_an_overflowing_gradient_is_caught_before_its_weights_are_saved(tmp_path: Any) -> None:
    @spec
    class Overflowing(Plain):
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            weight = ctx.modules["classifier"][1].weight  # type: ignore[index]
            yield Update(("classifier",), lambda: (weight - weight.detach()).abs().sum().sqrt())  # d sqrt at 0 is inf

    with pytest.raises(UserError, match=r"classifier\.1\.weight of player classifier is (nan|inf)"):
        run(Overflowing(), recipe(batch_size=40), checkpoints=tmp_path)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_batch_larger_than_the_training_set_is_named() -> None:
    with pytest.raises(UserError, match="batch_size 64 is more than the 40 training images"):
        run(Plain(), recipe(batch_size=64, drop_last=True))


@spec
class Signalled(Plain):
    """Gets a signal in the middle of step 5."""

    number: int

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        if ctx.step == 5:
            signal.raise_signal(signal.Signals(self.number))
        yield from super().step(ctx, x, y)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_lets_the_step_finish_and_saves(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], number: signal.Signals, expected: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(expected):
        run(Signalled(number=int(number)), recipe(epochs=3), checkpoints=tmp_path)
    assert signal.getsignal(number) is before
    assert "stopped after step 6 of 12: saved" in capsys.readouterr().err
    straight = run(Plain(), recipe(epochs=3))
    resumed = run(Signalled(number=int(number)), recipe(epochs=3), checkpoints=tmp_path)
    assert "resumed after step 6 of 12" in capsys.readouterr().err
    assert same(weights(resumed), weights(straight)) and resumed.curves == straight.curves


def test_plain_lines_tell_epoch_loss_accuracy_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    run(Plain(), recipe(epochs=2), val_data=data(30, 1), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("epoch 1/2  loss ") and lines[1].endswith("0:00 left")
    assert all(word in lines[1] for word in ("clean", "robust", "lr 0.1"))


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        run(Plain(), recipe(epochs=2), val_data=data(30, 1), progress=True)
        monkeypatch.undo()
    shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "\x1b[" in shown
    frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", shown).replace("\n", "\r").split("epoch 2/2")[-1].split("\r")
    assert re.search(r"loss \S+ +clean \S+ % +robust \S+ %", "".join(frame))
    assert len(re.findall(r"\d:\d\d:\d\d", "".join(frame))) == 2  # spent, and left


def drawn(augment: bool, pad: int = 1, flip: bool = True) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """What a method draws in its steps, blindly and by label, and at the end of its epochs."""
    given: list[tuple[Tensor, Tensor]] = []
    at_end: list[Tensor] = []

    def see(ctx: Context, x: Tensor, y: Tensor) -> None:
        given.extend([ctx.draw(30), ctx.draw(len(y), y)])

    def close(ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        at_end.append(ctx.draw(30)[0])

    run(Watching(see=see, at_epoch_end=close), recipe(augment=augment), pad=pad, flip=flip)
    return given, at_end


def known(images: Tensor, samples: Tensor) -> Tensor:
    """(N,) whether each image is one of `samples`."""
    return (images.flatten(1)[:, None] == samples.flatten(1)[None]).all(2).any(1)


def test_what_a_step_draws_is_augmented_as_its_batch_is_and_what_is_measured_is_not() -> None:
    (given, at_end), (again, _), (plain, plain_end) = drawn(True), drawn(True), drawn(False)
    samples = data()
    every = samples.x(torch.arange(len(samples)))
    cut = F.pad(every, (1, 1, 1, 1))
    moved = [cut[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    possible = torch.cat([*moved, *(m.flip(3) for m in moved)])
    for (x, y), (x2, y2), (x3, _) in zip(given, again, plain, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2), "the same in every run"
        assert known(x, possible).all() and known(x, every).float().mean() < 0.5
        assert known(x3, every).all()
    assert torch.equal(given[0][1], plain[0][1]), "the images are chosen before they are cut"
    assert all(known(x, every).all() for x in [*at_end, *plain_end])


def test_only_what_the_data_set_has_is_done_to_what_is_drawn() -> None:
    samples = data()
    every = samples.x(torch.arange(len(samples)))
    flipped = drawn(True, pad=0)[0]
    assert all(known(x, torch.cat([every, every.flip(3)])).all() for x, _ in flipped)
    nothing, plain = drawn(True, pad=0, flip=False)[0], drawn(False)[0]
    assert all(torch.equal(x, x2) for (x, _), (x2, _) in zip(nothing, plain, strict=True))
