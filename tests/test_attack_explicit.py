"""EXP: the density in closed form, the search against a plain loop, exact passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_toys import Counter, digits, linear_system, system, trained_network
from scipy import integrate, stats
from torch import Tensor

from casemate.attacks.base import Cost
from casemate.attacks.distributions import TanhGaussian
from casemate.attacks.explicit import EXP, distribution
from casemate.attacks.gradient import PGD
from casemate.errors import UserError
from casemate.seeding import generator
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel, untargeted

EPS = 8 / 255
LINF = ThreatModel("linf", 0.1)


def gaussian(mean: float, sigma: float, shape: Sequence[int] = (1, 1, 1, 1), radius: float = EPS) -> TanhGaussian:
    rho = math.log(math.expm1(sigma))
    return TanhGaussian(torch.full(tuple(shape), mean), torch.full(tuple(shape), rho), radius)


def quantiles(n: int = 200_000) -> Tensor:
    """Standard normal numbers that stand for all of them: n x 1 x 1 x 1."""
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.tensor(stats.norm.ppf(levels.numpy()), dtype=torch.float32).view(-1, 1, 1, 1)


# --- the density ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, math.log(2), 1.5])
def test_the_entropy_is_that_of_the_density_in_one_dimension(sigma: float) -> None:
    """Oracle 10: minus the integral of p log p over delta in (-eps, eps), with p from the change of variables."""

    def density(delta: float) -> float:
        share = delta / EPS
        return float(stats.norm.pdf(math.atanh(share), scale=sigma)) / (EPS * (1 - share * share))

    def integrand(delta: float) -> float:
        p = density(delta)
        return -p * math.log(p) if p > 0 else 0.0

    edge = EPS * (1 - 1e-12)
    exact, _ = integrate.quad(integrand, -edge, edge, limit=400)
    assert float(gaussian(0.0, sigma).surprisal(quantiles()).mean()) == pytest.approx(exact, abs=1e-3)


def test_no_width_beats_the_uniform_distribution_and_the_start_is_near_it() -> None:
    authors = -0.5 * math.log(2 * math.pi) - math.log(EPS)  # the constants that their code leaves out
    noise = quantiles(20_000)
    for mean in (0.0, 0.5, 2.0):
        values = [float(gaussian(mean, sigma).surprisal(noise).mean()) for sigma in (0.1, 0.5, 0.8, 1.0, 2.0)]
        assert max(values) <= math.log(2 * EPS) + 1e-4
        assert max(values) + authors <= -0.2258 + 1e-4
    assert float(gaussian(0.0, math.log(2)).surprisal(noise).mean()) + authors == pytest.approx(-0.2713, abs=1e-3)


def test_far_out_the_density_is_finite_and_so_is_its_slope() -> None:
    for mean in (-80.0, 80.0):
        there = gaussian(mean, 0.7)
        leaf = there.mean.clone().requires_grad_()
        value = TanhGaussian(leaf, there.rho, EPS).surprisal(torch.ones(1, 1, 1, 1)).sum()
        (slope,) = torch.autograd.grad(value, leaf)
        assert value.isfinite() and slope.isfinite().all() and float(value.detach()) < -10


def test_samples_lie_in_the_open_ball_and_in_the_box() -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 1, 8, 8)
    found = TanhGaussian(5 * torch.randn_like(x), torch.randn_like(x), 0.3)
    x_adv = found.perturb(x, torch.randn_like(x))
    assert ThreatModel("linf", 0.3).contains(x_adv, x).all()
    centre = (x + 0.3 * found.mean.tanh()).clamp(0, 1)
    assert torch.equal(found.perturb(x, torch.zeros_like(x)), centre)
    assert torch.equal(found[torch.tensor([3])].mean, found.mean[3:4])


# --- the search -----------------------------------------------------------------------------------------------


def fit(attack: EXP, victim: TorchSystem, x: Tensor, y: Tensor, threat: ThreatModel = LINF) -> tuple[Any, Cost]:
    cost = Cost.zero(len(x))
    with victim.frozen():
        return attack.fit(victim.views()["adaptive"], x, untargeted(y), threat, 7, cost), cost


@pytest.mark.parametrize("accumulate", [True, False])
def test_the_search_is_adam_on_means_and_widths(accumulate: bool) -> None:
    """Against torch's Adam, autograd and the formula of the density without its constants."""
    x, y = (part[1500:1508] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = EXP(steps=4, samples=3, keep="last", accumulate=accumulate, entropy=0.05)
    found, cost = fit(attack, victim, x, y)

    mean, rho = (torch.zeros_like(x, requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([mean, rho], lr=0.3, betas=(0.0, 0.0))
    for step in range(4):
        if not accumulate:
            adam.zero_grad()
        for noise in torch.randn(3, *x.shape, generator=generator(7, "sample", step)):
            a = torch.tanh(mean + F.softplus(rho) * noise)
            surprisal = noise.square() / 2 + F.softplus(rho).log() + (1 - a * a + 1e-30).log()
            loss = F.cross_entropy(victim.logits((x + 0.1 * a).clamp(0, 1)), y, reduction="none")
            (-(loss.sum() + 0.05 * surprisal.flatten(1).mean(1).sum()) / 3).backward(inputs=[mean, rho])
        adam.step()
    assert torch.allclose(found.last[:, 0], mean, atol=2e-3) and torch.allclose(found.last[:, 1], rho, atol=2e-3)
    assert cost.forwards.tolist() == cost.backwards.tolist() == [12] * 8


def test_the_first_step_moves_every_mean_by_the_rate_or_not_at_all() -> None:
    torch.manual_seed(0)
    victim = linear_system(torch.randn(3, 16))
    x, y = torch.full((5, 1, 1, 16), 0.5), torch.tensor([0, 1, 2, 0, 1])
    found, _ = fit(EXP(steps=1, samples=4, keep="last"), victim, x, y)
    assert torch.allclose(found.last[:, 0].abs(), torch.full_like(x, 0.3), atol=1e-4)
    found, _ = fit(EXP(steps=7, samples=5, keep="last"), victim, x, y)
    assert found.last.abs().max() <= 7 * 0.3 + 1e-4


def test_more_weight_on_the_entropy_gives_more_of_it() -> None:
    x, y = (part[1500:1520] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    noise = quantiles(400)[:, None]
    entropies = []
    for weight in (0.0, 1.0, 100.0):
        found, _ = fit(EXP(keep="last", steps=10, samples=4, entropy=weight), victim, x, y)
        entropies.append(float(distribution(found.last, LINF).surprisal(noise).mean()))
    assert entropies[0] < entropies[1] < entropies[2] <= math.log(2 * LINF.radius)
    whole, _ = fit(EXP(keep="last", steps=10, samples=4, entropy=1.0, entropy_over="sum"), victim, x, y)
    assert float(distribution(whole.last, LINF).surprisal(noise).mean()) > entropies[1]


def test_a_linear_model_falls_where_the_ball_reaches_and_never_beyond() -> None:
    torch.manual_seed(1)
    weight = torch.randn(2, 16)
    victim = linear_system(weight, shape=(1, 4, 4))
    x = torch.rand(200, 1, 4, 4) * 0.4 + 0.3
    z = victim.logits(x)
    y = z.argmax(1)
    apart = weight[1] - weight[0]
    distance = (z[:, 1] - z[:, 0]).abs() / apart.abs().sum()
    done = EXP()(victim, x, untargeted(y), LINF)
    assert done.success[distance < 0.9 * LINF.radius].all() and not done.success[distance > LINF.radius].any()
    assert (distance < 0.9 * LINF.radius).sum() > 20 and (distance > LINF.radius).sum() > 20


def test_it_is_about_as_strong_as_pgd() -> None:
    x, y = (part[1500:] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    mine = EXP()(victim, x, untargeted(y), LINF).success.float().mean()
    theirs = PGD(steps=20)(victim, x, untargeted(y), LINF).success.float().mean()
    assert 0.3 < theirs < 0.95 and mine > theirs - 0.03


# --- what is kept, and what it costs --------------------------------------------------------------------------


def test_all_passes_are_spent_on_images_that_stand_and_few_on_others() -> None:
    counter = Counter(trained_network())
    victim = system(counter, (1, 8, 8), 10)
    x, y = (part[1500:1560] for part in digits())
    attack = EXP(steps=6, samples=5, draws=3)
    done = attack(victim, x, untargeted(y), LINF)
    assert sum(counter.forwards) == int(done.cost.forwards.sum() + done.cost.queries.sum())
    assert sum(counter.gradients) == int(done.cost.backwards.sum())
    stands = ~done.success
    assert stands.any() and done.success.any()
    assert (done.cost.forwards[stands] == 30 + 1).all() and (done.cost.queries[stands] == 2).all()
    assert done.cost.forwards[done.success].float().mean() < 25
    bound = attack.passes(victim.views()["adaptive"], 60)
    assert bound == (60 * 30, 60 * 30, 60 * 2)


def test_the_authors_protocol_spends_all_and_takes_one_fresh_sample() -> None:
    x, y = (part[1500:1530] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = EXP(steps=3, samples=2, keep="last")
    done = attack(victim, x, untargeted(y), LINF, seed=7)
    assert done.cost.forwards.tolist() == [3 * 2 + 1] * 30 and int(done.cost.queries.sum()) == 0
    found, _ = fit(attack, victim, x, y)
    noise = torch.randn(x.shape, generator=generator(7, "final", 0))
    assert torch.equal(done.x_adv, distribution(found.last, LINF).perturb(x, noise))
    centre = EXP(steps=3, samples=2, keep="last", final="mean")(victim, x, untargeted(y), LINF, seed=7)
    assert torch.equal(centre.x_adv, (x + LINF.radius * found.last[:, 0].tanh()).clamp(0, 1))


def test_more_draws_fell_no_less() -> None:
    x, y = (part[1500:1700] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    small = ThreatModel("linf", 0.06)
    one, ten = (
        EXP(steps=3, samples=2, keep="last", draws=d)(victim, x, untargeted(y), small).success for d in (1, 10)
    )
    assert (ten | ~one).all() and ten.sum() > one.sum()


def test_an_image_does_not_feel_its_batch() -> None:
    x, y = (part[1500:1520].clone() for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = EXP(steps=5, samples=3)
    before = attack(victim, x, untargeted(y), ThreatModel("linf", 0.05))
    others = torch.arange(20) != 11
    x[others], y[others] = digits()[0][:19], digits()[1][:19]
    after = attack(victim, x, untargeted(y), ThreatModel("linf", 0.05))
    assert torch.allclose(before.x_adv[11], after.x_adv[11], atol=1e-5)


class Veiled(TorchSystem):
    """Its face does not show what it decides."""

    def views(self) -> dict[str, View]:
        return {name: replace(view, exact=False) for name, view in super().views().items()}


def test_where_success_cannot_be_seen_the_highest_loss_is_kept() -> None:
    victim = Veiled(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    x, y = (part[1500:1540] for part in digits())
    best, last = (EXP(steps=4, samples=3, keep=k)(victim, x, untargeted(y), LINF, seed=7) for k in ("best", "last"))
    assert best.cost.queries.tolist() == [1] * 40 and int(last.cost.queries.sum()) == 0  # the final draw competes
    assert best.cost.forwards.tolist() == last.cost.forwards.tolist() == [4 * 3 + 1] * 40
    with torch.no_grad():
        reached, unkept = (F.cross_entropy(victim.logits(d.x_adv), y, reduction="none") for d in (best, last))
    assert (reached >= unkept - 1e-6).all() and reached.mean() > unkept.mean()


def test_mistakes_are_named() -> None:
    x, y = (part[:2] for part in digits())
    with pytest.raises(UserError, match="final 'mean' needs draws 1"):
        EXP(final="mean", draws=2)
    with pytest.raises(UserError, match="EXP works in linf, not in l2"):
        EXP()(system(trained_network(), (1, 8, 8), 10), x, untargeted(y), ThreatModel("l2", 1.0))
