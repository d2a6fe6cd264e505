"""The collapse alarm: its rules on curves, a real collapse, and what each action does to a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from stepping import Bench, Probe, linear_network
from torch import Tensor, nn
from training_toys import Plain, batch_norm_net, data, recipe, run, same, weights

from casemate.data import Loaded
from casemate.data.device import DeviceData
from casemate.defenses.alarm import CollapseAlarm, Measured, collapse
from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.crafting import Ascent, crafting
from casemate.defenses.fgsm_ll import FGSMLL
from casemate.defenses.fgsm_rs import FGSMRS
from casemate.defenses.fgsm_ut import FGSMUT
from casemate.defenses.free import Free
from casemate.defenses.n_fgsm import NFGSM
from casemate.defenses.one_step import OneStep
from casemate.fields import Count, spec
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Task, Trainable, Update
from casemate.training.loop import Trained, train

NAN = float("nan")


def curve(pgd: list[float], fgsm: list[float] | None = None, train: list[float] | None = None) -> list[Measured]:
    fgsm, train = fgsm or [p + 0.05 for p in pgd], train or [NAN] * len(pgd)
    return [Measured(epoch, *row) for epoch, row in enumerate(zip(pgd, fgsm, train, strict=True), 1)]


RISING = [0.2, 0.3, 0.4, 0.44, 0.45, 0.46]


@pytest.mark.parametrize(
    ("rows", "classes", "verdict"),
    [
        (curve([*RISING, 0.45]), 10, None),
        (curve([*RISING, 0.24]), 10, None),  # a drop of 22 points, and still above half
        (curve([*RISING, 0.04]), 10, "robustness lost"),
        (curve([*RISING, 0.04], [*RISING, 0.3]), 10, "catastrophic overfitting"),
        (curve([*RISING, 0.04], None, [0.5] * 6 + [0.7]), 10, "catastrophic overfitting"),
        (curve([*RISING, 0.04], None, [0.3] + [0.5] * 6), 10, "robustness lost"),  # that rise was long before
        (curve([*RISING, 0.04, 0.04, 0.04], [*RISING, 0.1, 0.1, 0.3]), 10, "catastrophic overfitting"),
        (curve([*RISING, 0.04]), 4, None),  # 46 % is not twice chance
        (curve([0.3, 0.12, 0.1]), 10, None),  # epochs 2 and 3 are too early
        (curve([0.1, 0.11, 0.1, 0.09, 0.1, 0.02, 0.01]), 10, None),  # never left chance
        ([], 10, None),
    ],
)
def test_the_rules(rows: list[Measured], classes: int, verdict: str | None) -> None:
    assert collapse(rows, classes, after=5) == verdict


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([(1.0, 1.0)] * 7, "catastrophic overfitting"),
        ([(1.0, 1.0)] * 6 + [(0.1, 0.1)], "robustness lost"),  # it fell as the last epoch began
        ([(1.0, 1.0)] * 5 + [(1.0, 0.1), (0.1, 0.1)], "robustness lost"),  # within the one before
        ([(1.0, 1.0)] * 5 + [(0.1, 0.1)] * 2, "catastrophic overfitting"),  # before both
        ([(1.0, 1.0)] * 6 + [(0.9, 0.6)], "catastrophic overfitting"),  # no drop, a slope
    ],
)
def test_a_jump_in_training_is_no_sign_where_the_learning_rate_has_dropped(
    factors: list[tuple[float, float]], verdict: str
) -> None:
    """Accuracy in training rises from 50 to 70 % in the epoch in which robustness is lost."""
    rows = curve([*RISING, 0.04], None, [0.5] * 6 + [0.7])
    rows = [row._replace(began=began, ended=ended) for row, (began, ended) in zip(rows, factors, strict=True)]
    assert collapse(rows, 10, after=5) == verdict


def test_looks_within_an_epoch_count_by_their_epoch_and_have_no_accuracy_in_training() -> None:
    rows = curve([*RISING, 0.45, 0.04], None, [0.5] * 6 + [NAN, 0.7])
    rows[6:] = [row._replace(epoch=7.0) for row in rows[6:]]
    assert collapse(rows, 10, after=7) == "catastrophic overfitting"  # 6 and 7 are compared as a whole
    assert collapse(rows[:7], 10, after=7) is None
    late = [*rows[:7], rows[7]._replace(epoch=8.0)]  # nobody knows what epoch 7 had
    assert collapse(late, 10, after=7) == "robustness lost"
    assert collapse(rows, 10, after=8) is None


def test_the_first_armed_epoch_is_an_option() -> None:
    rows = curve([0.3, 0.12])
    assert [collapse(rows, 10, after) for after in (2, 3)] == ["robustness lost", None]


# --- a real collapse ----------------------------------------------------------------------------------------------


@spec
class Lapsing(FGSMUT):
    """PGD-4 for the first `sound` epochs, then what fgsm_ut does."""

    sound: Count = 7
    ends: Any = None
    """A list for the weights at the end of each epoch."""

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        if self.ends is not None:
            self.ends.append({k: v.clone() for k, v in ctx.modules["classifier"].state_dict().items()})
        super().epoch_end(ctx, validate)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        if ctx.epoch >= self.sound:
            yield from super().step(ctx, x, y)
            return
        classifier, threat, goal = ctx.modules["classifier"], ctx.threat, untargeted(y)
        pgd, start = Ascent(threat, 4, threat.radius / 2), threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(classifier, bn=self.bn_mode_attack):
            x_adv = pgd(lambda at: cross_entropy(classifier(at), goal), x, start)
        yield from self.learn(ctx, x_adv, y)


def perceptron() -> nn.Module:
    hidden = [nn.Linear(64, 256), *(nn.Linear(256, 256) for _ in range(2))]
    blocks = [m for layer in hidden for m in (layer, nn.BatchNorm1d(256), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(256, 10))


def learned(
    digits: Loaded, method: Trainable, epochs: int, lr: float = 0.003, network: Callable[[], nn.Module] = perceptron
) -> Trained:
    """Radius 0.3 on the 8 x 8 digits."""
    made = recipe(epochs=epochs, optimizer="adam", lr=lr, batch_size=64)
    task = Task((1, 8, 8), 10, ThreatModel("linf", 0.3), network, made.player)
    return train(method, task, DeviceData(digits.train), None, made, seed=0, device="cpu")


def on_digits(digits: Loaded, epochs: int, **options: Any) -> Trained:
    return learned(digits, Lapsing(bn_mode_attack="train_update", **options), epochs)


def test_catastrophic_overfitting_happens_and_is_caught_in_its_first_epoch(
    digits: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = on_digits(digits, 10).curves
    assert [row["collapsed"] for row in rows] == [0.0] * 7 + [1.0] * 3
    assert capsys.readouterr().err.count("warning: catastrophic overfitting in epoch 8: PGD-10 leaves") == 1
    assert max(row["alarm_pgd"] for row in rows[:7]) > 0.2 > 0.12 > rows[-1]["alarm_pgd"]
    assert rows[-1]["alarm_fgsm"] > 0.3 and rows[-1]["alarm_alignment"] < rows[6]["alarm_alignment"]
    assert rows[-1]["train_robust"] > rows[6]["train_robust"], "the loss alone looks better than ever"


def test_fgsm_ut_loses_the_robustness_that_it_begins_with_and_is_caught(
    digits: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    """The registered methods as they are: at_pgd, then fgsm_ut from its weights, as a row under `tuned` is trained.

    From fresh weights it has nothing to lose here: at radius 0.3 accuracy under PGD stays below 17 % while that under
    FGSM climbs past 60 %, and at 0.15 and 0.2 the digits hold out for 40 to 60 epochs.
    """
    sound = learned(digits, ATPGD(steps=5, step_factor=2.0, ramp=0.3, bn_mode_attack="train"), 15)
    assert capsys.readouterr().err == ""
    start = sound.modules["classifier"].requires_grad_()
    rows = learned(digits, FGSMUT(bn_mode_attack="train_update"), 14, lr=0.001, network=lambda: start).curves
    assert capsys.readouterr().err.count("warning: catastrophic overfitting in epoch") == 1
    assert rows[0]["collapsed"] == 0 and rows[-1]["collapsed"] == 1
    assert max(row["alarm_pgd"] for row in rows) > 0.25 > 0.15 > rows[-1]["alarm_pgd"]
    assert rows[-1]["alarm_fgsm"] - rows[-1]["alarm_pgd"] > 0.3
    assert rows[-1]["train_robust"] > rows[0]["train_robust"] + 0.1, "in training it looks better and better"


@pytest.mark.slow
def test_sound_training_sets_nothing_off(digits: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    rows = on_digits(digits, 9, sound=99).curves
    assert not any(row["collapsed"] for row in rows) and "warning" not in capsys.readouterr().err


def test_stop_ends_the_run_with_the_weights_before_the_collapse(
    digits: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: list[dict[str, Tensor]] = []
    stopped = on_digits(digits, 40, alarm="stop", ends=ends)
    assert (stopped.epochs, stopped.chosen_epoch) == (8, 7)
    assert "stopped at the look before" in capsys.readouterr().err
    assert same(weights(stopped), ends[6]) and not same(ends[6], ends[7])


def test_falling_back_restores_the_epoch_before_and_survives_the_next(
    digits: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: list[dict[str, Tensor]] = []
    rows = on_digits(digits, 9, alarm="fallback_pgd", ends=ends).curves
    assert "back to the look before, and on with PGD-2" in capsys.readouterr().err
    assert [row.get("fell_back") for row in rows] == [None] * 7 + [1.0, None]
    assert [row["collapsed"] for row in rows] == [0.0] * 7 + [1.0, 0.0]
    assert same(ends[6], ends[7]) and not same(ends[7], ends[8])
    assert rows[7]["alarm_pgd"] < 0.12 < 0.15 < rows[8]["alarm_pgd"]


# --- on toys ------------------------------------------------------------------------------------------------------


def test_the_alarm_changes_no_weight_and_off_measures_nothing() -> None:
    watched = run(FGSMUT(), recipe(epochs=3), val_data=data(30, 1))
    quiet = run(FGSMUT(alarm="off"), recipe(epochs=3), val_data=data(30, 1))
    assert same(weights(watched), weights(quiet))
    extra = {"alarm_pgd", "alarm_fgsm", "alarm_alignment", "collapsed"}
    assert watched.curves[0].keys() - quiet.curves[0].keys() == extra


class Died(Exception):
    pass


def test_what_it_knows_survives_a_resumed_run(tmp_path: Path) -> None:
    """The same images, the curve so far and the accuracy of a half-done epoch."""

    @spec
    class Mortal(FGSMUT):
        dies: bool = False

        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            if self.dies and ctx.step == 10:
                raise Died
            yield from super().step(ctx, x, y)

    import casemate.training.loop as loop

    made = recipe(epochs=5, lr=0.5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        patch.setattr(loop._Run, "identity", lambda self, given: {"run": "mortal"})
        run(Mortal(dies=True), made, checkpoints=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "identity", lambda self, given: {"run": "mortal"})
        resumed = run(Mortal(), made, checkpoints=tmp_path)
    straight = run(Mortal(), made)
    assert same(weights(resumed), weights(straight)) and resumed.curves == straight.curves


def test_it_measures_the_worst_corner_of_a_linear_network_on_256_images_drawn_once() -> None:
    """Logits (a - 2 b, b): both attacks end at x + 0.1 (-1, 1) for label 0 and x + 0.1 (1, -1) for label 1."""
    bench = Bench(FGSMUT(alarm="stop"), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
    x = torch.tensor([[0.9, 0.1], [0.6, 0.1], [0.3, 0.2], [0.4, 0.5]]).view(
        4, 1, 1, 2
    )  # z_0 - z_1 = .6, .3, -.3, -1.1
    drawn: list[int] = []

    def draw(n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        drawn.append(n)
        return x, torch.tensor([0, 0, 1, 1])  # a - 3 b = .6, .3, -.3, -1.1; in the corners .2, -.1, .1, -.7

    bench.ctx.draw = draw
    for _ in range(2):
        bench.ctx.keep = False
        assert isinstance(bench.defense, FGSMUT) and bench.defense.look(bench.ctx, 1.0, epoch_over=True) is None
        assert {k: float(bench.ctx.logs[k]) for k in ("alarm_pgd", "alarm_fgsm")} == {
            "alarm_pgd": 0.5,
            "alarm_fgsm": 0.5,
        }
        assert float(bench.ctx.logs["alarm_alignment"]) == pytest.approx(1)
        assert bench.ctx.keep and not bench.ctx.stop
    assert drawn == [256]


# --- actions, on what the looks are made to find -------------------------------------------------------------------

Slow = list[int]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], Slow]:
    """(steps done at which a look finds a collapse, steps that are crafted by PGD-2)."""
    lost: set[int] = set()
    slow: Slow = []
    whole = OneStep.slow_step

    def measure(self: CollapseAlarm, ctx: Context, *, log: bool) -> tuple[int, float, float]:
        return 10, *((0.04, 0.5) if ctx.step + 1 in lost else (0.5, 0.55))

    def slow_step(self: OneStep, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        slow.append(ctx.step)
        yield from whole(self, ctx, x, y)

    monkeypatch.setattr(CollapseAlarm, "_measure", measure)
    monkeypatch.setattr(OneStep, "slow_step", slow_step)
    return lost, slow


EARLY: dict[str, Any] = {"alarm_every": 2, "alarm_after": 1}
"""4 steps an epoch: looks after 2, 4 (the epoch is over), 6, ..."""


@pytest.mark.parametrize(("found", "steps", "chosen"), [(6, 6, 1.0), (8, 8, 1.5), (10, 10, 2.0)])
def test_stop_within_an_epoch_ends_with_the_weights_of_the_look_before(
    found: int, steps: int, chosen: float, at: tuple[set[int], Slow]
) -> None:
    at[0].update(range(found, 30))
    made: dict[str, Any] = {"lr": 0.5, "ema": 0.5}
    stopped = run(FGSMUT(alarm="stop", **EARLY), recipe(epochs=5, **made), network=batch_norm_net)
    assert (stopped.steps, stopped.chosen_epoch) == (steps, chosen)
    assert [row["epoch"] for row in stopped.curves] == [*range(1, (steps + 3) // 4), steps / 4]
    before = run(FGSMUT(alarm="off"), recipe(epochs=chosen, **made), network=batch_norm_net)
    assert same(weights(stopped), weights(before))


@pytest.mark.parametrize(
    ("found", "slow"),
    [({6}, [6, 7]), ({8}, [8, 9, 10, 11]), ({8, 10}, [8, 9, 10, 11]), ({6, 12}, [6, 7, 12, 13, 14, 15])],
)
@pytest.mark.parametrize("kind", [FGSMUT, FGSMRS, FGSMLL, NFGSM, Free, "early stop"])
def test_falling_back_crafts_by_pgd_2_to_the_end_of_the_epoch(
    kind: Any, found: set[int], slow: Slow, at: tuple[set[int], Slow]
) -> None:
    at[0].update(found)
    options: dict[str, Any] = {"alarm": "fallback_pgd", **EARLY}
    if kind is Free:
        options["replays"] = 1
    method = FGSMRS(early_stop=True, **options) if kind == "early stop" else kind(**options)
    trained = run(method, recipe(epochs=5), network=batch_norm_net)
    assert at[1] == slow and trained.steps == 20
    epochs = {-(-step // 4) for step in found}
    assert {number for number, row in enumerate(trained.curves, 1) if row.get("fell_back")} == epochs


def test_every_so_many_steps_replays_counted(at: tuple[set[int], Slow]) -> None:
    for method, dues in ((FGSMUT(), [200, 400]), (FGSMUT(alarm_every=0), []), (Free(replays=3), [201, 402])):
        bench, looks = Bench(method), []
        for done in range(method.updates_per_batch, 450, method.updates_per_batch):
            bench.ctx.step, before = done - 1, len(bench.ctx.state.get("alarm/curve", ()))
            method.look(bench.ctx, 1.0, epoch_over=False)
            looks += [done] * (len(bench.ctx.state.get("alarm/curve", ())) - before)
        assert looks == dues


def test_pgd_2_takes_two_steps_of_half_the_radius_from_a_uniform_start() -> None:
    bench = Bench(FGSMUT(bn_mode_attack="train"))
    bench.ctx.state["alarm/fallen"] = torch.tensor(1.0)
    x, y = torch.full((4, 1, 6, 6), 0.5), torch.arange(4)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    start = bench.threat.random_start(x, generator("step", 0))
    assert (len(passes.inputs), passes.frozen, passes.train) == (3, [True, True, False], [True] * 3)
    assert torch.equal(passes.inputs[0], start)
    for before, after in zip(passes.inputs, passes.inputs[1:], strict=False):
        moved = (after - before).abs()
        assert float(moved.max()) == pytest.approx(0.05, abs=1e-6)
        assert bool(((moved > 0.049) | ((after - x).abs() > 0.0999) | (moved == 0)).all())
    assert "alarm/train" not in bench.ctx.state, "its accuracy is of another attack"


@spec
class Returning(Plain):
    """Holds its first epoch and goes back to it after the second, in which it trains or does not."""

    idle: bool = False

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        if not (self.idle and ctx.epoch == 1):
            yield from super().step(ctx, x, y)

    def look(self, ctx: Context, factor: float, *, epoch_over: bool) -> Literal["hold", "go back"] | None:
        wish: dict[int, Literal["hold", "go back"]] = {0: "hold", 1: "go back"}
        return wish.get(ctx.epoch) if epoch_over else None


@pytest.mark.parametrize("optimizer", [{"momentum": 0.9}, {"optimizer": "adam", "lr": 0.01}])
def test_going_back_is_to_weights_optimizers_and_averages(optimizer: dict[str, Any]) -> None:
    """What was learned in between leaves no trace; it is measured and selected as it is after going back."""
    made = recipe(**{"epochs": 3, "ema": 0.5, "ema_statistics": "averaged", **optimizer})
    busy, idle = (run(Returning(idle=i), made, network=batch_norm_net, val_data=data(30, 1)) for i in (False, True))
    assert same(weights(busy), weights(idle))
    scores = [{k: row[k] for k in ("val_clean", "val_robust")} for row in busy.curves]
    assert scores[1] == scores[0] and scores == [{k: row[k] for k in scores[0]} for row in idle.curves]
    assert not same(weights(busy), weights(run(Plain(), made, network=batch_norm_net)))


@pytest.mark.parametrize("died", [5, 7, 9])
def test_a_run_that_falls_back_resumes_bit_for_bit(died: int, at: tuple[set[int], Slow], tmp_path: Path) -> None:
    """Broken off with something held, while PGD-2 crafts, and after it."""
    at[0].add(6)
    alive = [died]

    @spec
    class Mortal(FGSMRS):
        def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            self.die(ctx)
            yield from super().quick_step(ctx, x, y)

        def slow_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            self.die(ctx)
            yield from super().slow_step(ctx, x, y)

        def die(self, ctx: Context) -> None:
            if ctx.step == died and alive:
                alive.clear()
                raise Died

    made = recipe(epochs=4, lr=0.5, momentum=0.9, ema=0.5)
    method = Mortal(alarm="fallback_pgd", **EARLY)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr("casemate.training.loop.SAVE_SECONDS", 0.0)
        run(method, made, network=batch_norm_net, checkpoints=tmp_path)
    resumed = run(method, made, network=batch_norm_net, checkpoints=tmp_path)
    straight = run(method, made, network=batch_norm_net)
    assert same(weights(resumed), weights(straight)) and resumed.curves == straight.curves
    assert resumed.curves[1]["fell_back"] == 1.0
