"""ADT-EXP-AM: one backward pass that two players read oppositely, passes, statistics, entropy, every option."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adversary_toys import conv_means, learns, look_at, running_mean, square_batch, square_network
from stepping import LINF, Bench, moved, tracked
from torch import Tensor, nn

from casemate.defenses.adt_exp_am import ADTEXPAM
from casemate.defenses.distributional import opposed
from casemate.errors import UserError
from casemate.networks.base import count_parameters
from casemate.seeding import generator
from casemate.threat import ThreatModel


def small(**options: Any) -> ADTEXPAM:
    return ADTEXPAM(**{"width": 4, "gradient_input": "rms", "generator_lr": 0.01, **options})


class Constant(nn.Module):
    """A generator of one mean and one rho."""

    def __init__(self, mean: float, rho: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([mean, rho]))

    def forward(self, seen: Tensor) -> Tensor:
        return self.values.view(1, 2, 1, 1).expand(len(seen), 2, *seen.shape[2:])


@pytest.mark.parametrize(("loss", "outer"), [("ce", 1), ("trades", 2)])
def test_passes_and_running_statistics(loss: Any, outer: int) -> None:
    looked = look_at(small(loss=loss))
    assert looked.images == (2, outer)
    assert looked.f.train == [False, False] + [True] * outer
    assert looked.f.backwards == 2 + outer
    assert looked.g.train == [True] and looked.g.backwards == 1
    assert tracked(looked.bench.f) == outer and tracked(looked.bench.modules["generator"]) == 1
    assert [players for players, _ in looked.updates] == [("classifier", "generator")]
    for name, before in looked.before.items():
        assert moved(dict(before.named_parameters()), looked.bench.modules[name])  # type: ignore[arg-type]


def test_running_statistics_never_see_clean_images() -> None:
    looked = look_at(small())
    x_adv = looked.f.inputs[-1]
    assert not torch.allclose(x_adv, looked.x, atol=0.01) and bool(LINF.contains(x_adv, looked.x).all())
    torch.testing.assert_close(running_mean(looked.bench), conv_means(looked.before["classifier"], x_adv))


@pytest.mark.parametrize("how", ["batch", "batch64", "maxabs", "frobenius", "rms"])
def test_the_generator_sees_the_image_and_two_gradients(how: Any) -> None:
    looked = look_at(small(gradient_input=how))
    f, x, y = copy.deepcopy(looked.before["classifier"]).eval(), looked.x, looked.y

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(f(at), y, reduction="sum"), at)[0]

    first = gradient(x)
    second = gradient((x + 0.1 * first.sign()).clamp(0, 1))
    expected = []
    for g in (first, second):
        scale = {
            "batch": torch.tensor(8.0), "batch64": torch.tensor(64.0),
            "maxabs": g.abs().amax((1, 2, 3), keepdim=True),
            "frobenius": g.square().sum((1, 2, 3), keepdim=True).sqrt(),
        }  # fmt: skip
        expected.append(g / scale.get(how, g.square().mean((1, 2, 3), keepdim=True).sqrt()))
    torch.testing.assert_close(looked.g.inputs[0], torch.cat([x, *expected], 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_each_player_gets_its_gradient(loss: Any) -> None:
    """theta: the loss; phi: minus beta (robust part + entropy weight x H). Against two plain backward passes."""
    defense = small(loss=loss, beta=3.0, entropy=0.2)
    bench, (x, y) = Bench(defense, square_network), square_batch()
    f, g = (copy.deepcopy(bench.modules[name]).train() for name in ("classifier", "generator"))
    seen: list[Tensor] = []
    bench.modules["generator"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    bench.step(x, y)

    mu, rho = g(seen[0]).chunk(2, 1)
    r = torch.randn(x.shape, generator=generator("step", 0))
    sigma = F.softplus(rho)
    u = mu + sigma * r
    x_adv = (x + 0.1 * u.tanh()).clamp(0, 1)
    entropy = (r**2 / 2 + sigma.log() + (1 - u.tanh() ** 2).log()).mean()
    if loss == "ce":
        theirs = robust = F.cross_entropy(f(x_adv), y)
    else:
        clean = f(x)
        p, q = clean.softmax(1), f(x_adv).softmax(1)
        robust = 3 * (p * (p / q).log()).sum(1).mean()
        theirs, entropy = F.cross_entropy(clean, y) + robust, 3 * entropy
    down = torch.autograd.grad(theirs, list(f.parameters()), retain_graph=True)
    up = torch.autograd.grad(-robust - 0.2 * entropy, list(g.parameters()), allow_unused=True)
    for parameter, gradient in zip(bench.f.parameters(), down, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    for parameter, own in zip(bench.modules["generator"].parameters(), up, strict=True):
        torch.testing.assert_close(parameter.grad, own, rtol=1e-3, atol=1e-6)
    assert max(float(own.abs().max()) for own in up) > 1e-3


def test_the_reversal_changes_no_bit_and_turns_the_gradient() -> None:
    x = torch.rand(1000, generator=generator("x")).requires_grad_()
    assert torch.equal(opposed(x), x)
    (gradient,) = torch.autograd.grad((3 * opposed(x)).sum(), x)
    assert bool((gradient == -3).all())


@pytest.mark.parametrize("over", ["mean", "sum"])
def test_the_loss_and_the_entropy_by_hand(over: Any) -> None:
    """One mu and one rho everywhere: -log density of radius tanh(mu + sigma r), numbers by numpy."""
    bench, (x, y) = Bench(small(entropy_over=over, entropy=0.01), square_network), square_batch()
    bench.modules["generator"] = Constant(0.4, -0.5)
    bench.players["generator"].parameters[:] = [bench.modules["generator"].values]  # type: ignore[list-item]
    f = copy.deepcopy(bench.f).train()
    ((_, loss),) = bench.step(x, y)
    r = torch.randn(x.shape, generator=generator("step", 0)).double().numpy()
    sigma = math.log(1 + math.exp(-0.5))
    u = 0.4 + sigma * r
    density = np.exp(-(r**2) / 2) / math.sqrt(2 * math.pi) / sigma / (1 - np.tanh(u) ** 2) / 0.1
    surprisal = -np.log(density).reshape(8, -1)
    entropy = (surprisal.mean(1) if over == "mean" else surprisal.sum(1)).mean()
    assert float(bench.ctx.logs["entropy"]) == pytest.approx(entropy, rel=1e-5)
    x_adv = (x + 0.1 * torch.from_numpy(np.tanh(u)).float()).clamp(0, 1)
    assert loss == pytest.approx(F.cross_entropy(f(x_adv), y).item() - 0.01 * entropy, rel=1e-4)


def test_a_saturated_pixel_teaches_the_generator_nothing_but_entropy() -> None:
    """The cut to [0, 1] comes before the reversal."""
    bench = Bench(small(entropy=0.0), square_network)
    bench.modules["generator"] = Constant(3.0, -6.0)
    values = bench.modules["generator"].values
    bench.players["generator"].parameters[:] = [values]  # type: ignore[list-item]
    bench.step(torch.ones(4, 1, 8, 8), torch.arange(4))
    assert isinstance(values, nn.Parameter) and values.grad is not None and not values.grad.any()


def test_the_adversary_learns_to_raise_the_loss() -> None:
    bench, (x, y) = Bench(small(), square_network, lr=0.0), square_batch()
    values = []
    for _ in range(30):
        bench.step(x, y)
        values.append(float(bench.ctx.logs["robust"]))
    assert sum(values[-5:]) > sum(values[:5]) + 0.05


def test_players_and_published_sizes() -> None:
    bench = Bench(small(generator_lr=0.003))
    optimizer = bench.players["generator"].optimizer
    assert isinstance(optimizer, torch.optim.Adam) and bench.players["generator"].schedule is None
    assert optimizer.param_groups[0]["lr"] == 0.003 and optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert list(bench.players) == ["classifier", "generator"]
    with torch.device("meta"):
        assert count_parameters(ADTEXPAM().build((3, 32, 32), 10)["generator"]) == 10_330_880
    assert ADTEXPAM().generator_lr == 2e-4


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = ADTEXPAM()
    assert (chosen.entropy, chosen.entropy_over, chosen.gradient_input) == (0.01, "mean", "batch64")
    assert (chosen.width, chosen.generator_lr, chosen.loss, chosen.beta) == (256, 2e-4, "ce", 6.0)


def test_the_radius_grows_for_the_gradients_too() -> None:
    looked = look_at(small(ramp=0.5), fraction=0.25)
    assert float((looked.f.inputs[1] - looked.x).abs().max()) == pytest.approx(0.05, abs=1e-6)
    assert float((looked.f.inputs[2] - looked.x).abs().max()) < 0.05
    assert math.isfinite(look_at(small(ramp=0.5), fraction=0.0).updates[0][1])


def test_another_norm_is_refused() -> None:
    with pytest.raises(UserError, match="defense ADTEXPAM works in linf, not in l2"):
        Bench(small(), threat=ThreatModel("l2", 0.5))


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_it_learns_one_batch(loss: Any) -> None:
    first, last, accuracy = learns(small(loss=loss, beta=1.0, generator_lr=0.001))
    assert last < first / 3 and accuracy == 1
