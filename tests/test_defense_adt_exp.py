"""ADT-EXP: the authors' inner loop bit by bit, its bounds, passes, statistics, both losses, every option."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversary_toys import conv_means, learns, look_at, running_mean, square_batch, square_network
from stepping import LINF, Bench, linear_network, moved, tracked
from torch import Tensor

from casemate.attacks.distributions import TanhGaussian
from casemate.defenses.adt_exp import ADTEXP
from casemate.errors import UserError
from casemate.seeding import generator
from casemate.threat import ThreatModel


def search(defense: ADTEXP, n: int = 8) -> tuple[TanhGaussian, Tensor, Tensor]:
    """(the distributions, mu, rho) that the defense finds around a fresh network's batch."""
    (x, y), f = square_batch(n), square_network().eval()
    found = defense.search(defense.raised(f, x, y), x, LINF, generator("search"))
    return found, found.mean.detach(), found.rho.detach()


def h(u: Tensor, r: Tensor, sigma: Tensor) -> Tensor:
    """The authors' entropy integrand, without their 1e-8 and without constants."""
    return r**2 / 2 + sigma.log() + (1 - u.tanh() ** 2).log()


# --- the step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "before", "outer"), [("ce", 35, 1), ("trades", 36, 2)]
)  # 36 forward passes, 35 and 1 backward ones
def test_passes_and_running_statistics(loss: Any, before: int, outer: int) -> None:
    looked = look_at(ADTEXP(loss=loss))
    assert looked.images == (before, outer)
    assert looked.f.train == [False] * (7 + outer - 1) + [True] * outer
    assert looked.f.backwards == 7 + outer
    assert tracked(looked.bench.f) == outer
    assert [players for players, _ in looked.updates] == [("classifier",)]
    assert moved(dict(looked.before["classifier"].named_parameters()), looked.bench.f)  # type: ignore[arg-type]


def test_running_statistics_never_see_clean_images() -> None:
    looked = look_at(ADTEXP())
    x_adv = looked.f.inputs[-1]
    assert not torch.allclose(x_adv, looked.x, atol=0.01)
    torch.testing.assert_close(running_mean(looked.bench), conv_means(looked.before["classifier"], x_adv))


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("over", ["mean", "sum"])
def test_the_search_is_the_authors(accumulate: bool, over: Any) -> None:
    """Their loop: torch's Adam, one draw at a time, a batch mean, gradients cleared or not; float64."""
    defense = ADTEXP(accumulate=accumulate, entropy_over=over, entropy=0.05, steps=6, samples=3)
    (x, y), f = square_batch(), square_network().double().eval()
    x = x.double()
    mu, rho = torch.zeros_like(x).requires_grad_(), torch.zeros_like(x).requires_grad_()
    adam, rng = torch.optim.Adam([mu, rho], lr=0.3, betas=(0.0, 0.0), eps=1e-30), generator("search")
    for _ in range(6):
        if not accumulate:
            adam.zero_grad()
        for r in torch.randn(3, *x.shape, generator=rng).double():
            sigma = F.softplus(rho)
            u = mu + sigma * r
            surprisal = h(u, r, sigma).flatten(1)
            entropy = (surprisal.mean(1) if over == "mean" else surprisal.sum(1)).mean()
            (-F.cross_entropy(f((x + 0.1 * u.tanh()).clamp(0, 1)), y) - 0.05 * entropy).backward()
        adam.step()
    # Losses are computed in float32, and the attack's Adam adds 1e-8: where gradients cancel, a sign may differ.
    found = defense.search(defense.raised(f, x, y), x, LINF, generator("search"))
    for mine, theirs in ((found.mean, mu), (found.rho, rho)):
        assert float(((mine - theirs).abs() < 0.03).float().mean()) > 0.98
    assert float(mu.detach().abs().max()) > 1.0


def test_accumulated_gradients_change_the_search() -> None:
    (_, one, _), (_, other, _) = search(ADTEXP()), search(ADTEXP(accumulate=False))
    assert not torch.allclose(one, other)


def test_means_and_widths_stay_in_their_bounds() -> None:
    for steps in (1, 3, 7):
        _, mu, rho = search(ADTEXP(steps=steps))
        assert float(mu.abs().max()) <= 0.3 * steps + 1e-5
        assert float(rho.abs().max()) <= 0.3 * steps + 1e-5
    _, mu, rho = search(ADTEXP(steps=1))
    for moves in (mu, rho):
        assert float(torch.isclose(moves.abs(), torch.tensor(0.3), atol=0.01).float().mean()) > 0.98
    _, mu, _ = search(ADTEXP(steps=1, search_lr=0.1))
    assert float(mu.abs().max()) == pytest.approx(0.1, abs=1e-4)


def test_the_first_step_up_the_entropy_by_hand() -> None:
    """d h / d mu = -2 tanh u, d h / d rho = (1 / sigma - 2 r tanh u) / 2 at rho = 0, where u = r ln 2."""
    defense, x = ADTEXP(steps=1, samples=4), square_batch(2)[0]
    found = defense.search(lambda at: 0 * at.flatten(1).sum(1), x, LINF, generator("search"))
    r = torch.randn(4, *x.shape, generator=generator("search"))
    slope = (r * math.log(2)).tanh()
    up = ((-2 * slope).mean(0).sign(), (1 / math.log(2) - 2 * r * slope).mean(0).sign())
    torch.testing.assert_close(found.mean, 0.3 * up[0], rtol=0, atol=0.01)
    torch.testing.assert_close(found.rho, 0.3 * up[1], rtol=0, atol=0.01)


def test_the_weight_raises_the_entropy_step_by_step() -> None:
    r = torch.randn(200, 8, 1, 8, 8, generator=generator("judge"))

    def entropy(**options: Any) -> float:
        return float(search(ADTEXP(**options))[0].surprisal(r).mean())

    by_weight = [entropy(entropy=weight) for weight in (0.0, 0.001, 0.01, 0.1)]
    assert by_weight == sorted(by_weight) and by_weight[-1] > by_weight[0] + 2
    by_steps = [entropy(steps=steps, entropy=1e4, search_lr=0.02, samples=50) for steps in (1, 3, 6, 9)]
    assert by_steps == sorted(by_steps) and by_steps[-1] > by_steps[0] + 0.01
    assert by_steps[-1] < math.log(2 * 0.1), "that of the uniform distribution"


def test_the_search_raises_the_loss() -> None:
    (x, y), f = square_batch(), square_network().eval()
    r = torch.randn(50, *x.shape, generator=generator("judge"))

    def loss(found: TanhGaussian) -> float:
        return float(F.cross_entropy(f.requires_grad_(False)(found.perturb(x, r).flatten(0, 1)), y.repeat(50)))

    start = TanhGaussian(torch.zeros_like(x), torch.zeros_like(x), 0.1)
    assert loss(search(ADTEXP(steps=2))[0]) > loss(start)
    assert loss(search(ADTEXP())[0]) > loss(search(ADTEXP(steps=2))[0])


def test_the_classifier_learns_from_one_fresh_draw() -> None:
    looked = look_at(ADTEXP(steps=2, samples=3))
    (x, y), f, rng = square_batch(), square_network().eval(), generator("step", 0)
    defense = ADTEXP(steps=2, samples=3)
    found = defense.search(defense.raised(f, x, y), x, LINF, rng)
    torch.testing.assert_close(looked.f.inputs[-1], found.perturb(x, torch.randn(x.shape, generator=rng)))
    assert bool(LINF.contains(looked.f.inputs[-1], x).all())
    assert [len(seen) for seen in looked.f.inputs] == [24, 24, 8]


# --- the losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "beta"), [("ce", 6.0), ("trades", 1.0), ("trades", 6.0)])
def test_the_losses_by_hand(loss: Any, beta: float) -> None:
    weight = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]
    bench = Bench(ADTEXP(loss=loss, beta=beta), lambda: linear_network(weight))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    inputs: list[Tensor] = []
    bench.f.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().clone()))
    ((_, value),) = bench.step(x, y)
    w = torch.tensor(weight).double()
    p, q = ((images.view(2, 2).double() @ w.T).softmax(1) for images in (x, inputs[-1]))
    if loss == "ce":
        expected = -q[[0, 1], y].log().mean()
    else:
        expected = -p[[0, 1], y].log().mean() + beta * (p * (p / q).log()).sum(1).mean()
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_labels_matter_to_the_adversary_of_ce_and_not_to_that_of_trades() -> None:
    for loss, blind in (("ce", False), ("trades", True)):
        crafted = [look_at(ADTEXP(loss=loss), roll=roll).f.inputs[-1] for roll in (0, 1)]  # type: ignore[arg-type]
        assert torch.equal(*crafted) is blind


def test_the_divergence_is_from_the_clean_probabilities_of_every_image() -> None:
    (x, y), f, defense = square_batch(3), square_network().eval(), ADTEXP(loss="trades", samples=2)
    at = torch.rand(6, 1, 8, 8, generator=generator("at"))
    p, q = f(x).softmax(1).repeat(2, 1), f(at).softmax(1)
    torch.testing.assert_close(defense.raised(f, x, y)(at), (p * (p / q).log()).sum(1))


# --- the rest -------------------------------------------------------------------------------------------------


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = ADTEXP()
    assert (chosen.steps, chosen.samples, chosen.search_lr, chosen.entropy) == (7, 5, 0.3, 0.01)
    assert (chosen.entropy_over, chosen.accumulate, chosen.loss, chosen.beta) == ("mean", True, "ce", 6.0)


@pytest.mark.parametrize(("fraction", "radius"), [(0.0, 1e-12), (0.25, 0.05), (0.9, 0.1)])
def test_the_radius_grows(fraction: float, radius: float) -> None:
    looked = look_at(ADTEXP(ramp=0.5), fraction=fraction)
    far = float((looked.f.inputs[-1] - looked.x).abs().max())
    assert 0.8 * radius - 1e-7 <= far <= radius + 1e-7
    assert math.isfinite(looked.updates[0][1])


def test_no_radius_leaves_the_clean_loss() -> None:
    looked = look_at(ADTEXP(), threat=ThreatModel("linf", 0.0))
    clean = F.cross_entropy(copy.deepcopy(looked.before["classifier"])(looked.x), looked.y)
    assert looked.updates[0][1] == pytest.approx(clean.item(), rel=1e-5)


def test_another_norm_is_refused() -> None:
    with pytest.raises(UserError, match="defense adt_exp works in linf, not in l2"):
        Bench(ADTEXP(), threat=ThreatModel("l2", 0.5))


@pytest.mark.parametrize("loss", ["ce", "trades"])
def test_it_learns_one_batch(loss: Any) -> None:
    first, last, accuracy = learns(ADTEXP(loss=loss, beta=1.0))
    assert last < first / 3 and accuracy == 1
