"""What the gradient attacks find, against answers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_toys import digits, linear_system, system, trained_network
from torch import Tensor, nn

from casemate.attacks.base import Attack
from casemate.attacks.carlini_wagner import CWL2
from casemate.attacks.gradient import FGSM, MIM, PGD, CWMargin
from casemate.errors import UserError
from casemate.registry import names, resolve
from casemate.seeding import generator
from casemate.threat import ThreatModel, targeted, untargeted

ITERATIVE: list[Attack] = [
    PGD(steps=40), PGD(steps=40, objective="margin"), PGD(steps=40, keep="last"), CWMargin(steps=40),
    MIM(steps=40, relative_step=0.1),
]  # fmt: skip


def linear_problem(classes: int, pixels: int = 12, n: int = 60) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
    """A linear system, images away from the box, labels = its decisions, and exact linf and l2 distances."""
    rng = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, pixels, generator=rng)
    victim = linear_system(weight)
    x = 0.5 + 0.1 * torch.randn(n, 1, 1, pixels, generator=rng).clamp(-2, 2)
    with torch.no_grad():
        z = victim.logits(x)
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z
    apart = weight[y][:, None] - weight[None]
    own = torch.arange(classes)[None] == y[:, None]
    linf = (gaps / apart.abs().sum(2)).masked_fill(own, torch.inf).amin(1)
    l2 = (gaps / apart.norm(dim=2)).masked_fill(own, torch.inf).amin(1)
    return victim, x, y, linf, l2


def away_from(distances: Tensor, radius: float) -> Tensor:
    """Images whose distance is not within 2 % of the radius, where rounding and step size could decide."""
    return (distances / radius - 1).abs() > 0.02


@pytest.mark.parametrize("attack", ITERATIVE, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_two_linear_classes_an_attack_succeeds_exactly_within_the_distance(attack: Attack, norm: Any) -> None:
    victim, x, y, linf, l2 = linear_problem(2)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    clear = away_from(distances, radius)
    result = attack(victim, x, untargeted(y), ThreatModel(norm, radius))
    assert torch.equal(result.success[clear], (distances < radius)[clear])
    assert 10 < int(result.success.sum()) < 50


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_four_linear_classes_nothing_succeeds_beyond_the_distance_and_the_targets_together_reach_it(
    norm: Any,
) -> None:
    """Towards a target the margin is concave, so nothing is missed; untargeted losses have local maxima."""
    victim, x, y, linf, l2 = linear_problem(4)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    threat, clear = ThreatModel(norm, radius), away_from(distances, radius)
    within = (distances < radius)[clear]
    aim = PGD(steps=100, objective="margin")
    aimed = [aim(victim, x, targeted(y, torch.full_like(y, t)), threat).success & (y != t) for t in range(4)]
    assert torch.equal(torch.stack(aimed).any(0)[clear], within)
    for attack in (PGD(steps=40), PGD(steps=40, restarts=5), PGD(steps=40, objective="margin")):
        found = attack(victim, x, untargeted(y), threat).success[clear]
        assert not (found & ~within).any()
        assert int(found.sum()) >= 0.85 * int(within.sum())


def test_targeted_attacks_succeed_exactly_within_the_distance_of_the_target() -> None:
    victim, x, y, linf, _ = linear_problem(2)
    radius = float(linf.median())
    clear = away_from(linf, radius)
    for attack in (PGD(steps=40), CWMargin(steps=40)):
        result = attack(victim, x, targeted(y, 1 - y), ThreatModel("linf", radius))
        assert torch.equal(result.success[clear], (linf < radius)[clear])
        assert torch.equal(result.prediction[result.success], (1 - y)[result.success])


def test_fgsm_is_the_signed_gradient_of_the_cross_entropy_and_exact_for_two_classes() -> None:
    victim, x, y, linf, _ = linear_problem(2)
    radius = float(linf.median())
    result = FGSM()(victim, x, untargeted(y), ThreatModel("linf", radius))
    clear = away_from(linf, radius)
    assert torch.equal(result.success[clear], (linf < radius)[clear])

    victim, x, y, _, _ = linear_problem(4)
    weight = victim.classifier[1].weight.detach()
    p = victim.logits(x).softmax(1).detach()
    delta = FGSM()(victim, x, untargeted(y), ThreatModel("linf", 0.01)).x_adv - x
    assert torch.allclose(delta.flatten(1), 0.01 * (p @ weight - weight[y]).sign(), atol=1e-7)


def test_fgsm_with_a_random_start_is_another_attack() -> None:
    victim, x, y, _, _ = linear_problem(4)
    threat = ThreatModel("linf", 0.05)
    plain, noisy = (FGSM(random_start=r)(victim, x, untargeted(y), threat).x_adv for r in (False, True))
    assert not torch.allclose(plain, noisy)
    assert threat.contains(noisy, x).all()


def test_fgsm_with_a_random_start_steps_from_there_and_is_projected_back() -> None:
    """R-FGSM of ATLD and Feature-Scattering: clip(project(x0 + radius * sign(g(x0)))), x0 uniform in the ball."""
    victim, x, y, _, _ = linear_problem(4)
    weight, threat = victim.classifier[1].weight.detach(), ThreatModel("linf", 0.05)
    start = threat.random_start(x, generator(11, "restart", 0))
    assert float((start - x).abs().max()) > 0.049 and abs(float((start - x).mean())) < 0.005
    slope = victim.logits(start).detach().softmax(1) @ weight - weight[y]
    expected = (start.flatten(1) + 0.05 * slope.sign() - x.flatten(1)).clamp(-0.05, 0.05)
    result = FGSM(random_start=True)(victim, x, untargeted(y), threat, seed=11)
    stood = victim.decide(start) == y  # what the noise alone has put wrong is kept as it is
    assert 30 < int(stood.sum()) < len(x)
    assert torch.allclose((result.x_adv - x).flatten(1)[stood], expected[stood], atol=1e-6)
    assert torch.equal(result.x_adv[~stood], start[~stood])
    assert result.cost.forwards.tolist() == [2] * len(x) and result.cost.backwards.tolist() == [1] * len(x)


@pytest.mark.parametrize("attack", [PGD(steps=3), CWL2(steps=20, rounds=2, rate=0.1)], ids=lambda a: type(a).__name__)
def test_an_attack_may_be_called_where_gradients_are_off(attack: Attack) -> None:
    victim, x, y, linf, _ = linear_problem(2)
    threat = ThreatModel("linf", float(linf.median()))
    plain = attack(victim, x, untargeted(y), threat)
    with torch.no_grad():
        assert torch.equal(attack(victim, x, untargeted(y), threat).x_adv, plain.x_adv)


class Valley(nn.Module):
    """Logits [10, f]; df/dx = (1, 1 - 9 (x2 - .5), .5 - 8 (x3 - .5))."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.flatten(1).unbind(1)
        f = a + b - 4.5 * (b - 0.5) ** 2 + 0.5 * c - 4 * (c - 0.5) ** 2
        return torch.stack([torch.full_like(a, 10.0), f], dim=1)


def test_momentum_of_three_steps_worked_out_by_hand() -> None:
    """Gradients (1, 1, .5), (1, .1, -.3), (1, -.8, .5). Over their l1 norms: (.4, .4, .2), (.71, .07, -.21),
    (.43, -.35, .22). The running sums of the second are .4, .47, .12, so momentum carries x2 up where the gradient
    turns; those of the third .2, -.01, .20 (over l2 norms the second would be positive)."""
    victim, x = system(Valley(), (1, 1, 3), 2), torch.full((1, 1, 1, 3), 0.5)
    goal, threat = untargeted(torch.tensor([0])), ThreatModel("linf", 0.35)
    steps = {"random_start": False, "step_size": 0.1, "objective": "margin", "keep": "last"}

    def after(attack: type[Any], k: int) -> Tensor:
        return attack(steps=k, **steps)(victim, x, goal, threat).x_adv.flatten()  # type: ignore[no-any-return]

    for k, expected in enumerate([(0.6, 0.6, 0.6), (0.7, 0.7, 0.5), (0.8, 0.8, 0.6)], start=1):
        assert torch.allclose(after(MIM, k), torch.tensor(expected))
    for k, expected in enumerate([(0.6, 0.6, 0.6), (0.7, 0.7, 0.5), (0.8, 0.6, 0.6)], start=1):
        assert torch.allclose(after(PGD, k), torch.tensor(expected))
    plain = MIM(steps=3, decay=0.0, **steps)(victim, x, goal, threat).x_adv.flatten()
    assert torch.allclose(plain, after(PGD, 3))


class Flat(nn.Module):
    """Class 0 wherever you look: there is no slope."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1)[:, :1] * 0 + 1, x.flatten(1)[:, 1:2] * 0], dim=1)


def test_without_a_slope_l2_wanders_at_random_and_linf_stays() -> None:
    victim, x = system(Flat(), (1, 1, 4), 2), torch.full((3, 1, 1, 4), 0.5)
    goal = untargeted(torch.zeros(3, dtype=torch.long))
    attack = PGD(steps=3, step_size=0.1, random_start=False)
    moved = attack(victim, x, goal, ThreatModel("l2", 0.3)).x_adv - x
    assert (moved.flatten(1).norm(dim=1) > 0.01).all()
    assert not torch.allclose(moved[0], moved[1])
    assert torch.equal(attack(victim, x, goal, ThreatModel("linf", 0.3)).x_adv, x)


def test_the_hinge_of_cw_stops_at_kappa_where_the_last_iterate_is_kept() -> None:
    victim = linear_system(torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 0.0]))
    x, goal = torch.full((1, 1, 1, 1), 0.48), untargeted(torch.tensor([0]))
    options: dict[str, Any] = {"steps": 10, "step_size": 0.03, "random_start": False, "keep": "last"}
    threat = ThreatModel("linf", 0.2)
    assert torch.allclose(CWMargin(kappa=0, **options)(victim, x, goal, threat).x_adv, torch.tensor(0.51))
    assert torch.allclose(CWMargin(kappa=0.05, **options)(victim, x, goal, threat).x_adv, torch.tensor(0.57))
    assert torch.allclose(CWMargin(**options)(victim, x, goal, threat).x_adv, torch.tensor(0.68))


def test_at_radius_one_half_nothing_stands() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    for attack in (PGD(), MIM(), CWMargin()):
        assert attack(victim, x[1500:], untargeted(y[1500:]), ThreatModel("linf", 0.5)).success.all()


def test_more_steps_and_restarts_never_leave_more_standing() -> None:
    x, y = digits()
    victim, goal = system(trained_network(), (1, 8, 8), 10), untargeted(y[1500:])
    threat = ThreatModel("linf", 0.1)
    fallen = [
        int(attack(victim, x[1500:], goal, threat).success.sum())
        for attack in (FGSM(), PGD(steps=5), PGD(steps=20), PGD(steps=20, restarts=3))
    ]
    assert fallen == sorted(fallen) and fallen[-1] > fallen[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", [n for n in names("attack") if n in ("fgsm", "pgd", "mim", "cw_margin")])
def test_results_lie_in_ball_and_box(name: str, norm: Any) -> None:
    x, y = digits()
    threat = ThreatModel(norm, 0.15)
    victim = system(trained_network(), (1, 8, 8), 10)
    result = resolve("attack", name)()(victim, x[:50], untargeted(y[:50]), threat)
    assert (threat.distance(result.x_adv, x[:50]) <= 0.15 + 1e-6).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    assert torch.equal(result.prediction, victim.decide(result.x_adv))
    assert torch.equal(result.success, result.prediction != y[:50])


def test_step_sizes() -> None:
    threat = ThreatModel("linf", 0.2)
    assert PGD(steps=10).size(threat) == pytest.approx(0.05)
    assert PGD(steps=10, relative_step=0.1).size(threat) == pytest.approx(0.02)
    assert PGD(steps=10, step_size=0.003).size(threat) == 0.003
    assert MIM().size(threat) == pytest.approx(0.05)
    assert MIM(step_size=0.003).size(threat) == 0.003
    assert PGD(steps=10).size(ThreatModel("linf", 0.0)) == 0


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match="PGD: give step_size or relative_step, not both"):
        PGD(step_size=0.1, relative_step=0.1)
    with pytest.raises(UserError, match="MIM: restarts without random_start"):
        MIM(restarts=2, random_start=False)
