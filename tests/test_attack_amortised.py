"""EXP-AM and IMP-AM: fitted by the loop, their passes, what the noise and the encoder do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, system, trained_network
from learned_toys import LINF, SHAPE, context, fit, fresh, strike
from torch import Tensor

from casemate.attacks.amortised import Amortised, AmortisedAttack, ExpAM, ExpAMTrainer, ImpAM, ImpAMTrainer, fgsm
from casemate.attacks.distributions import posterior_surprisal, scaled_gradient, uniform_noise
from casemate.attacks.learned import slope
from casemate.errors import UserError
from casemate.threat import ThreatModel, untargeted

BOTH: list[tuple[AmortisedAttack, Amortised]] = [
    (ExpAM(), ExpAMTrainer(width=8)),
    (ImpAM(), ImpAMTrainer(width=8, z_dim=8, encoder_width=4)),
]
NAMES = ["exp_am", "imp_am"]
SMALL = ThreatModel("linf", 0.1)


@functools.cache
def fitted(which: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return fit(BOTH[which][1], epochs=2)


@pytest.mark.parametrize("which", [0, 1], ids=NAMES)
def test_the_loop_fits_it_until_little_stands(which: int) -> None:
    attack, spec = BOTH[which]
    before = {k: v.clone() for k, v in trained_network().state_dict().items()}
    weights, curves = fitted(which)
    assert all(torch.equal(v, before[k]) for k, v in trained_network().state_dict().items())
    assert curves[-1]["fooled"] > curves[0]["fooled"] + 0.02 and curves[-1]["fooled"] > 0.9
    assert strike(attack, spec, weights).success.float().mean() > 0.9
    single = type(attack)(draws=1)
    assert strike(single, spec, fresh(spec)).success.float().mean() < 0.7
    assert strike(single, spec, weights).success.float().mean() > 0.8


@pytest.mark.parametrize("which", [0, 1], ids=NAMES)
def test_it_costs_two_gradients_and_a_query_for_each_draw_but_the_last(which: int) -> None:
    attack, spec = BOTH[which]
    counter = Counter(trained_network())
    victim = system(counter, (1, 8, 8), 10)
    done = strike(attack, spec, fitted(which)[0], victim, SMALL)
    assert sum(counter.forwards) == int(done.cost.forwards.sum() + done.cost.queries.sum())
    assert sum(counter.gradients) == int(done.cost.backwards.sum())
    stands = ~done.success
    assert 20 < stands.sum() < 277
    assert (done.cost.queries[stands] == 9).all() and done.cost.queries[done.success].float().mean() < 9
    assert (done.cost.forwards[stands] == 2 + 1).all() and (done.cost.backwards[stands] == 2).all()
    n = len(stands)
    bound = attack.with_weights(spec, fitted(which)[0], **SHAPE).passes(victim.views()["adaptive"], n)
    assert bound == (2 * n, 2 * n, 9 * n)
    one = strike(type(attack)(draws=1), spec, fitted(which)[0], threat=SMALL)
    assert int(one.cost.queries.sum()) == 0
    assert (done.success | ~one.success).all() and done.success.sum() >= one.success.sum()


@pytest.mark.parametrize("which", [0, 1], ids=NAMES)
def test_an_image_does_not_feel_its_batch(which: int) -> None:
    attack, spec = BOTH[which]
    x, y = (part[1500:1520].clone() for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    bound = attack.with_weights(spec, fitted(which)[0], **SHAPE)
    before = bound(victim, x, untargeted(y), SMALL)
    others = torch.arange(20) != 11
    x[others], y[others] = digits()[0][:19], digits()[1][:19]
    after = bound(victim, x, untargeted(y), SMALL)
    assert torch.allclose(before.x_adv[11], after.x_adv[11], atol=1e-5)
    assert SMALL.contains(before.x_adv, digits()[0][1500:1520]).all()


@pytest.mark.parametrize("which", [0, 1], ids=NAMES)
def test_a_step_moves_its_players_alone(which: int) -> None:
    spec = BOTH[which][1]
    ctx = context(spec)
    x, y = (part[:32] for part in digits())
    (update,) = spec.step(ctx, x, y)
    assert update.players == (("generator",), ("generator", "encoder"))[which]
    parameters = [p for name in update.players for p in ctx.modules[name].parameters()]
    torch.autograd.backward(update.loss(), inputs=parameters)
    assert all(p.grad is not None for p in parameters)
    assert all(p.grad is None for p in trained_network().parameters())
    assert 0 <= float(ctx.logs["fooled"]) <= 1


def test_the_generator_sees_the_image_and_two_gradients() -> None:
    x, y = (part[:6] for part in digits())
    goal = untargeted(y)
    _, values, gradient = slope(trained_network(), x, goal)
    assert values.shape == (6,)
    spec = ExpAMTrainer(gradient_input="batch64")
    point = fgsm(x, gradient, LINF)
    assert torch.allclose(point, (x + 0.3 * gradient.sign()).clamp(0, 1))
    seen = spec.seen(x, gradient, slope(trained_network(), point, goal)[2])
    assert seen.shape == (6, 3, 8, 8) and torch.equal(seen[:, :1], x)
    mean_of_64 = torch.autograd.grad(
        torch.nn.functional.cross_entropy(trained_network()(leaf := x.clone().requires_grad_()), y), leaf
    )[0] * (6 / 64)
    assert torch.allclose(seen[:, 1:2], mean_of_64, atol=1e-9)
    alone = slope(trained_network(), x[2:3], untargeted(y[2:3]))[2]
    assert torch.allclose(alone, gradient[2:3], atol=1e-7)


def test_gradients_are_scaled_image_by_image_and_nothing_stays_nothing() -> None:
    gradient = torch.stack([torch.full((1, 4, 4), 1e-30), torch.zeros(1, 4, 4), torch.randn(1, 4, 4)])
    largest = scaled_gradient(gradient, "maxabs")
    assert largest.flatten(1).abs().amax(1).tolist() == pytest.approx([1, 0, 1])
    rms = scaled_gradient(gradient, "rms")
    assert rms.flatten(1).square().mean(1).sqrt().tolist() == pytest.approx([1, 0, 1])
    frobenius = scaled_gradient(gradient, "frobenius")
    assert frobenius.flatten(1).norm(dim=1).tolist() == pytest.approx([1, 0, 1])
    assert torch.equal(scaled_gradient(gradient, "batch64"), gradient / 64)
    assert torch.equal(scaled_gradient(gradient, "batch"), gradient / 3)


def test_an_attack_does_not_scale_by_its_batch() -> None:
    with pytest.raises(UserError, match=r"gradient_input batch would let .* use batch64"):
        fit(ExpAMTrainer(width=4, gradient_input="batch"), epochs=1)


def test_the_entropy_of_an_image_is_the_sum_of_its_pixels() -> None:
    x, y = (part[:16] for part in digits())
    losses = {}
    for over in ("mean", "sum"):
        for weight in (0.0, 0.1):
            spec: Any = ExpAMTrainer(width=4, entropy=weight, entropy_over=over)
            ctx = context(spec)
            (update,) = spec.step(ctx, x, y)
            losses[over, weight] = float(update.loss().detach())
    assert losses["sum", 0.0] == losses["mean", 0.0]
    mean, total = (losses[over, 0.0] - losses[over, 0.1] for over in ("mean", "sum"))
    assert total == pytest.approx(64 * mean, rel=1e-3) and mean < 0  # the entropy is negative at this radius


# --- the noise and its encoder --------------------------------------------------------------------------------


def test_an_encoder_that_looks_at_nothing_reaches_less_than_the_authors_threshold() -> None:
    z = (torch.arange(100_000) + 0.5)[None] / 50_000 - 1
    blind = posterior_surprisal(z, torch.zeros_like(z), torch.full_like(z, 1 / 3))
    assert float(blind) == pytest.approx(0.8696, abs=2e-4) and float(blind) < ImpAMTrainer().threshold  # type: ignore
    sharp = posterior_surprisal(z, z, torch.full_like(z, 0.01))
    assert float(sharp) == pytest.approx(0.5 * torch.log(torch.tensor(2 * torch.pi * 0.01)).item(), abs=1e-3)
    drawn = uniform_noise(500, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 4) and -1 <= drawn.min() < -0.9 and 0.9 < drawn.max() <= 1


def test_the_noise_moves_the_perturbation_and_is_all_that_does() -> None:
    spec = BOTH[1][1]
    x = digits()[0][:3]
    modules = spec.build(**SHAPE)
    for module in modules.values():
        module.eval()
    seen, z = torch.rand(3, 3, 8, 8), uniform_noise(6, 8, torch.Generator().manual_seed(0))
    sample, at = spec.sampler(modules, seen, x, LINF), torch.arange(3)
    with torch.no_grad():
        first, again, other = sample(at, z[:3]), sample(at, z[:3]), sample(at, z[3:])
        assert torch.allclose(sample(at[1:2], z[1:2]), first[1:2], atol=1e-6)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert LINF.contains(first, x).all()


def test_the_encoder_presses_on_the_generator_only_above_the_threshold() -> None:
    x, y = (part[:32] for part in digits())
    losses, surprisals = {}, {}
    for threshold in (None, 0.0, 1e6):
        spec = ImpAMTrainer(width=4, z_dim=4, encoder_width=4, threshold=threshold, entropy=2.0)
        ctx = context(spec)
        (update,) = spec.step(ctx, x, y)
        losses[threshold], surprisals[threshold] = float(update.loss().detach()), float(ctx.logs["surprisal"])
    assert len(set(surprisals.values())) == 1 and surprisals[None] > 0
    assert losses[None] == losses[0.0] == pytest.approx(losses[1e6] + 2 * surprisals[None], rel=1e-5)


def test_the_spread_over_noise_is_logged_after_each_epoch() -> None:
    curves = fitted(1)[1]
    assert all(0 < row["spread"] < 1 and row["surprisal"] < 1.2 for row in curves)


def test_mistakes_are_named() -> None:
    x, y = (part[:2] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    with pytest.raises(UserError, match="attack ExpAM needs its weights"):
        ExpAM()(victim, x, untargeted(y), LINF)
    bound = ExpAM().with_weights(BOTH[0][1], fresh(BOTH[0][1]), **SHAPE)
    with pytest.raises(UserError, match="ExpAM works in linf, not in l2"):
        bound(victim, x, untargeted(y), ThreatModel("l2", 1.0))
    with pytest.raises(UserError, match="ImpAM cannot use the weights of a ExpAMTrainer"):
        ImpAM().with_weights(BOTH[0][1], fresh(BOTH[0][1]), **SHAPE)
