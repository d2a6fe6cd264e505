"""What defenses with a learned adversary have in common, in the real loop: resuming, precision, what is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adversary_toys import square_network
from stepping import LINF, Bench
from torch import Tensor
from training_toys import batch_norm_net, recipe, run, same, weights

from casemate.defenses.adt_exp import ADTEXP
from casemate.defenses.adt_exp_am import ADTEXPAM
from casemate.defenses.adt_imp_am import ADTIMPAM
from casemate.defenses.adversary import Ramped
from casemate.defenses.base import Defense
from casemate.defenses.l2l import L2L
from casemate.defenses.l2l_da import L2LDA
from casemate.defenses.l2l_star import L2LStar
from casemate.threat import ThreatModel
from casemate.trainable import Context
from casemate.training.recorder import ListRecorder

DEFENSES: dict[str, tuple[Defense, list[str]]] = {
    "adt_exp": (ADTEXP(steps=2, samples=2, ramp=0.5), ["classifier"]),
    "adt_exp_am": (ADTEXPAM(width=2, ramp=0.5), ["classifier", "generator"]),
    "adt_imp_am": (ADTIMPAM(width=2, z_dim=2, encoder_width=2), ["classifier", "encoder", "generator"]),
    "l2l": (L2L(width=2, steps=2), ["classifier", "generator"]),
    "l2l_star": (L2LStar(width=2), ["classifier", "generator"]),
    "l2l_da": (L2LDA(width=2, steps=2, z_dim=2, clean_warmup=0.4), ["classifier", "generator"]),
}
EVERY = pytest.mark.parametrize("name", DEFENSES)
MADE = recipe(epochs=3, momentum=0.9, schedule="cosine")


class Died(Exception):
    pass


class Mortal(ListRecorder):
    """Dies when the second epoch is over, before it is saved."""

    def metrics(self, values: Any, step: int | None = None) -> None:
        if step == 2:
            raise Died
        super().metrics(values, step=step)


@EVERY
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defense, modules = DEFENSES[name]
    straight = run(defense, MADE, network=batch_norm_net)
    with pytest.raises(Died):
        run(defense, MADE, network=batch_norm_net, checkpoints=tmp_path, recorder=Mortal())
    resumed = run(defense, MADE, network=batch_norm_net, checkpoints=tmp_path)
    assert "resumed after step 4 of 12" in capsys.readouterr().err
    assert sorted(straight.modules) == modules
    for module in modules:
        assert same(weights(resumed, module), weights(straight, module))
    assert resumed.curves == straight.curves


@EVERY
def test_it_trains_in_bf16(name: str) -> None:
    trained = run(DEFENSES[name][0], recipe(precision="bf16"), network=batch_norm_net)
    assert trained.precision == "bf16"
    assert all(value == value and abs(value) < 1e4 for row in trained.curves for value in row.values())
    exact = run(DEFENSES[name][0], recipe(), network=batch_norm_net)
    assert not same(weights(trained), weights(exact))


@EVERY
def test_the_classifier_is_deployed_alone(name: str) -> None:
    defense = DEFENSES[name][0]
    trained = run(defense, recipe(), network=batch_norm_net)
    system = defense.system(trained.modules, "plain", input_shape=(1, 4, 4), num_classes=3, threat=LINF)
    x = torch.rand(5, 1, 4, 4)
    with system.frozen(), torch.no_grad():
        assert torch.equal(system.views()["adaptive"].logits(x), trained.modules["classifier"](x))
    assert not system.changes_inference and not any(m.training for m in trained.modules.values())


def test_what_is_logged() -> None:
    expected = {
        "adt_exp": {"sigma", "robust"},
        "adt_exp_am": {"entropy", "robust"},
        "adt_imp_am": {"surprisal", "robust", "spread"},
        "l2l": {"fooled", "loss_generator"},
        "l2l_star": {"fooled", "loss_generator", "natural", "robust"},
        "l2l_da": {"fooled", "loss_generator", "natural", "robust", "apart"},
    }
    for name, logged in expected.items():
        row = run(DEFENSES[name][0], MADE, network=batch_norm_net, samples=None).curves[-1]
        assert set(row) == logged | {"epoch", "loss", "lr"}, name


@pytest.mark.parametrize(("ramp", "fraction", "radius"), [(0.0, 0.0, 0.1), (0.5, 0.1, 0.02), (0.5, 0.7, 0.1)])
def test_the_ramp(ramp: float, fraction: float, radius: float) -> None:
    ctx = Context({}, LINF, fraction=fraction)
    assert Ramped(ramp=ramp).threat(ctx).radius == pytest.approx(radius)


def test_a_ramp_begins_where_float32_sees_no_change() -> None:
    start = Ramped(ramp=1.0).threat(Context({}, ThreatModel("linf", 0.3), fraction=0.0))
    pixels: Tensor = torch.linspace(0, 1, 256)[1:]
    assert start.radius > 0 and torch.equal(pixels + start.radius, pixels)


def test_gradients_are_clipped_for_both_players_of_l2l_da() -> None:
    """One SGD step without momentum moves weights by at most lr x the norm that is left."""
    given = {"width": 2, "steps": 2, "z_dim": 2, "generator_momentum": 0.0, "generator_weight_decay": 0.0}
    for clip in (1e-4, 1e-2):
        defense = L2LDA(**given, generator_lr=1.0, max_grad_norm=clip)  # type: ignore[arg-type]
        before = run(defense, recipe(lr=1e-9, epochs=0.25), network=batch_norm_net)
        assert before.steps == 1
        still = L2LDA(**given, generator_lr=1e-12, max_grad_norm=clip)  # type: ignore[arg-type]
        after = {"generator": before, "classifier": run(still, recipe(lr=1.0, epochs=0.25), network=batch_norm_net)}
        other = {"generator": after["classifier"], "classifier": before}
        for name in after:
            pairs = zip(after[name].modules[name].parameters(), other[name].modules[name].parameters(), strict=True)
            moves = torch.cat([(a - b).flatten() for a, b in pairs]).norm().item()
            assert moves == pytest.approx(clip, rel=0.02), name


def test_a_batch_of_one_is_no_problem() -> None:
    for defense, _ in DEFENSES.values():
        bench = Bench(defense, square_network)
        bench.step(torch.rand(1, 1, 8, 8), torch.tensor([1]), 0.9)
