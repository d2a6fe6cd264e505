"""ADT-IMP-AM: the bound on the noise, who is moved by what, passes, statistics, every option."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversary_toys import conv_means, learns, look_at, running_mean, square_batch, square_network
from stepping import LINF, Bench, moved, tracked
from torch import Tensor

from casemate.defenses.adt_imp_am import ADTIMPAM
from casemate.networks.base import count_parameters
from casemate.seeding import generator


def small(**options: Any) -> ADTIMPAM:
    given = {"width": 4, "encoder_width": 4, "z_dim": 6, "gradient_input": "rms", "generator_lr": 0.01}
    return ADTIMPAM(**{**given, **options})


@pytest.mark.parametrize(("loss", "outer"), [("ce", 1), ("trades", 2)])
def test_passes_and_running_statistics(loss: Any, outer: int) -> None:
    looked = look_at(small(loss=loss))
    assert looked.images == (2, outer)
    assert looked.f.train == [False, False] + [True] * outer
    assert looked.f.backwards == 2 + outer and looked.g.train == [True]
    assert tracked(looked.bench.f) == outer
    assert tracked(looked.bench.modules["generator"]) == tracked(looked.bench.modules["encoder"]) == 1
    assert [players for players, _ in looked.updates] == [("classifier", "generator", "encoder")]


def test_running_statistics_never_see_clean_images() -> None:
    looked = look_at(small())
    x_adv = looked.f.inputs[-1]
    assert not torch.equal(x_adv, looked.x) and bool(LINF.contains(x_adv, looked.x).all())
    torch.testing.assert_close(running_mean(looked.bench), conv_means(looked.before["classifier"], x_adv))


def gradients(defense: ADTIMPAM) -> tuple[Bench, dict[str, list[Tensor]], float]:
    """(the bench after a step, what each player's gradient must have been, the surprisal by hand)."""
    bench, (x, y) = Bench(defense, square_network), square_batch()
    f, g, e = (copy.deepcopy(bench.modules[name]).train() for name in ("classifier", "generator", "encoder"))
    seen: list[Tensor] = []
    bench.modules["generator"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    bench.step(x, y)
    z = torch.rand(8, defense.z_dim, generator=generator("step", 0)) * 2 - 1
    pattern = g(seen[0], z).tanh()
    mean, variance = e(pattern)
    surprisal = ((z - mean) ** 2 / (2 * variance) + variance.log() / 2 + math.log(2 * math.pi) / 2).mean()
    pressed = surprisal if defense.threshold is None else (surprisal - defense.threshold).clamp(min=0)
    logits = f((x + 0.1 * pattern).clamp(0, 1))
    if defense.loss == "ce":
        theirs = robust = F.cross_entropy(logits, y)
    else:
        clean = f(x)
        p, q = clean.softmax(1), logits.softmax(1)
        robust = defense.beta * (p * (p / q).log()).sum(1).mean()
        theirs, pressed = F.cross_entropy(clean, y) + robust, defense.beta * pressed
    down = list(torch.autograd.grad(theirs, list(f.parameters()), retain_graph=True))
    adversary = -robust + defense.entropy * pressed
    wanted = {"classifier": down}
    for name, module in (("generator", g), ("encoder", e)):
        wanted[name] = list(torch.autograd.grad(adversary, list(module.parameters()), retain_graph=True))
    return bench, wanted, surprisal.item()


@pytest.mark.parametrize("loss", ["ce", "trades"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_each_player_gets_its_gradient(loss: Any, threshold: Any) -> None:
    bench, wanted, surprisal = gradients(small(loss=loss, beta=3.0, threshold=threshold))
    assert float(bench.ctx.logs["surprisal"]) == pytest.approx(surprisal, rel=1e-4)
    for name, gradient in wanted.items():
        for parameter, own in zip(bench.modules[name].parameters(), gradient, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, own, rtol=2e-3, atol=2e-6)
    assert max(float(own.abs().max()) for own in wanted["encoder"]) > 1e-3


def test_above_the_surprisal_the_threshold_silences_the_encoder() -> None:
    looked = look_at(small(threshold=5.0))
    assert not any(p.grad.any() for p in looked.bench.modules["encoder"].parameters() if p.grad is not None)
    clean, _ = looked.updates[0][1], looked.bench
    assert clean == pytest.approx(float(looked.bench.ctx.logs["robust"]))
    assert moved(dict(looked.before["generator"].named_parameters()), looked.bench.modules["generator"])  # type: ignore[arg-type]


def test_the_loss_is_the_robust_one_plus_the_weighted_pressure() -> None:
    for options, weight in (({"threshold": None, "entropy": 0.01}, 0.01), ({"threshold": 0.0, "entropy": 1.0}, 1.0)):
        looked = look_at(small(**options))
        logs = looked.bench.ctx.logs
        expected = float(logs["robust"]) + weight * float(logs["surprisal"])
        assert looked.updates[0][1] == pytest.approx(expected, rel=1e-6)


def test_the_encoder_learns_to_read_the_noise_and_the_generator_to_write_it() -> None:
    bench, (x, y) = Bench(small(z_dim=1, threshold=None, entropy=5.0), square_network, lr=0.0), square_batch()
    values = []
    for _ in range(80):
        bench.step(x, y)
        values.append(float(bench.ctx.logs["surprisal"]))
    assert min(values[-5:]) < 0.75 < values[0], "below what a blind encoder can reach"


def test_different_noise_gives_different_images() -> None:
    bench, (x, _) = Bench(small(), square_network), square_batch()
    seen = torch.rand(8, 3, 8, 8)
    z = small().noise(x.shape, generator("z"))
    bench.modules["generator"].eval()
    with torch.no_grad():
        one, again, other = (small().pattern(bench.modules, seen, noise) for noise in (z, z, -z))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert z.shape == (8, 6) and float(z.abs().max()) <= 1


def test_spread_is_logged_and_the_classifier_left_as_it_was() -> None:
    bench, (x, y) = Bench(small(), square_network), square_batch()
    bench.ctx.draw = lambda n, labels=None: (x.repeat(4, 1, 1, 1)[:n], y.repeat(4)[:n])
    bench.step(x, y)
    before = tracked(bench.f)
    small().epoch_end(bench.ctx, dict)
    assert float(bench.ctx.logs["spread"]) > 0
    assert tracked(bench.f) == before and bench.f.training and all(p.requires_grad for p in bench.f.parameters())


def test_players_and_published_sizes() -> None:
    bench = Bench(small(generator_lr=0.003))
    assert list(bench.players) == ["classifier", "generator", "encoder"]
    groups = {name: bench.players[name].optimizer.param_groups[0] for name in ("generator", "encoder")}
    assert {name: (g["lr"], g["betas"]) for name, g in groups.items()} == {
        "generator": (0.003, (0.5, 0.999)), "encoder": (0.003, (0.9, 0.999)),
    }  # fmt: skip
    with torch.device("meta"):
        made = ADTIMPAM().build((3, 32, 32), 10)
    assert {name: count_parameters(m) for name, m in made.items()} == {"generator": 10_606_080, "encoder": 724_384}


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = ADTIMPAM()
    assert (chosen.entropy, chosen.threshold, chosen.gradient_input, chosen.z_dim) == (1.0, 0.9, "batch64", 64)
    assert (chosen.width, chosen.encoder_width, chosen.generator_lr) == (256, 32, 2e-4)


def test_the_radius_grows() -> None:
    looked = look_at(small(ramp=0.5), fraction=0.25)
    assert float((looked.f.inputs[1] - looked.x).abs().max()) == pytest.approx(0.05, abs=1e-6)
    assert float((looked.f.inputs[2] - looked.x).abs().max()) <= 0.05


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_it_learns_one_batch(loss: Any) -> None:
    first, last, accuracy = learns(small(loss=loss, beta=1.0, generator_lr=0.001))
    assert last < first / 3 and accuracy == 1
