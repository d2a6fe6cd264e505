"""The collapse alarm: its rules on curves, a real collapse, and what each action does to a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import Bench, linear_network
from torch import Tensor, nn
from training_toys import data, recipe, run, same, weights

from casemate.data import Loaded
from casemate.data.device import DeviceData
from casemate.defenses.alarm import collapse
from casemate.defenses.at_pgd import ATPGD
from casemate.defenses.crafting import Ascent, crafting
from casemate.defenses.fgsm_ut import FGSMUT
from casemate.fields import Count, spec
from casemate.objectives import cross_entropy
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Task, Trainable, Update
from casemate.training.loop import Trained, train

NAN = float("nan")


def curve(pgd: list[float], fgsm: list[float] | None = None, train: list[float] | None = None) -> list[list[float]]:
    fgsm, train = fgsm or [p + 0.05 for p in pgd], train or [NAN] * len(pgd)
    return [list(row) for row in zip(pgd, fgsm, train, strict=True)]


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
def test_the_rules(rows: list[list[float]], classes: int, verdict: str | None) -> None:
    assert collapse(rows, classes, after=5) == verdict


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
    assert "stopped at the epoch before" in capsys.readouterr().err
    assert same(weights(stopped), ends[6]) and not same(ends[6], ends[7])


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
        bench.defense.epoch_end(bench.ctx, dict)
        assert {k: float(bench.ctx.logs[k]) for k in ("alarm_pgd", "alarm_fgsm")} == {
            "alarm_pgd": 0.5,
            "alarm_fgsm": 0.5,
        }
        assert float(bench.ctx.logs["alarm_alignment"]) == pytest.approx(1)
        assert bench.ctx.keep and not bench.ctx.stop
    assert drawn == [256]
