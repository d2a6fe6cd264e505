"""Attacks that know IMT: the smoothed sign, control of the mask, and the paper's own table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, trained_network
from stepping import linear_network
from torch import Tensor, nn

from casemate.attacks.adaptive import KNOWS, PreCompensation
from casemate.attacks.base import Attack
from casemate.attacks.gradient import PGD
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.networks.critics import Critic
from casemate.purification.imt import IMT, usual_size
from casemate.purification.imt_attacks import MaskControl, PublishedATLD, SmoothedSign, guided, procedures
from casemate.system import TorchSystem, View
from casemate.threat import Goal, ThreatModel, untargeted

TINY = ThreatModel("linf", 0.001)


class LinearCritic(Critic):
    """z = w . codes + bias."""

    def __init__(self, weight: list[float], bias: float = 0.0) -> None:
        super().__init__(nn.Sequential(), len(weight), 2, "conv1x1")
        self.score.weight.data = torch.tensor([weight])
        self.score.bias.data = torch.tensor([bias])


class SmoothCritic(Critic):
    """z = tanh(3 c_0) + c_0 c_1: its slope is nowhere constant."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(), 2, 2, "conv1x1")

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(3 * codes[:, 0]) + codes[:, 0] * codes[:, 1], codes


def behind(f: Classifier, critic: Critic, radius: float = 0.1, **options: Any) -> TorchSystem:
    imt = IMT(f, critic, radius=radius, **options)
    return TorchSystem(f, input_shape=f.input_shape, num_classes=f.num_classes, purification=imt, name="toy")


def images(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows).view(-1, 1, 1, 2)


def ours(label: int = 0, n: int = 1) -> Goal:
    return untargeted(torch.full((n,), label))


def digits_system(rule: Any = "interval") -> tuple[TorchSystem, Counter]:
    """The digits network, its head counted, behind a small ReLU critic of its logits."""
    torch.manual_seed(1)
    critic = Critic(nn.Sequential(nn.Linear(10, 16), nn.ReLU()), 16, 2, "conv3x3")
    critic.dense = True
    network = trained_network()
    counter = Counter(network.head)
    parts = dict(network.body.items())
    f = Classifier(input_shape=(1, 8, 8), num_classes=10, layers=parts, head=counter).eval()
    return behind(f, critic.eval(), 0.05, rule=rule), counter


def imt_of(victim: TorchSystem) -> IMT:
    assert isinstance(victim.purification, IMT)
    return victim.purification


# --- the purification's own faces ---------------------------------------------------------------------------------


def test_the_move_is_known_also_where_the_box_cuts_it() -> None:
    victim = behind(linear_network([[2.0, 0.0], [0.0, -3.0]]), LinearCritic([1.0, 1.0]))  # dz/dx = (2, -3)
    purified, push = imt_of(victim).moved(images((0.5, 0.5), (0.95, 0.05)))
    torch.testing.assert_close(purified, images((0.6, 0.4), (1.0, 0.0)))
    torch.testing.assert_close(push, images((0.1, -0.1), (0.1, -0.1)))
    walked = IMT(imt_of(victim).classifier, imt_of(victim).critic, radius=0.1, steps=4, step=0.5)
    torch.testing.assert_close(walked.moved(images((0.95, 0.5)))[1], images((0.1, -0.1)))


@pytest.mark.parametrize("steps", [1, 3])
def test_every_face_answers_what_is_deployed_bit_for_bit(steps: int) -> None:
    torch.manual_seed(0)
    victim = behind(linear_network([[2.0, 1.0], [-1.0, 3.0]]), SmoothCritic(), steps=steps, step=0.4)
    x = torch.rand(16, 1, 1, 2)
    deployed = victim.logits(x)
    views = victim.views()
    assert set(views) == {"static", "adaptive", "smoothed", "averaged"}
    with victim.frozen():
        for name in ("adaptive", "smoothed", "averaged"):
            view = views[name]
            assert view.exact and torch.equal(view.logits(x), deployed)
            assert torch.equal(view.logits(x.clone().requires_grad_()).detach(), deployed), name
    assert views["adaptive"].passes == (1 + steps, 1 + steps)
    assert views["smoothed"].passes == (1 + steps, 1 + 3 * steps)
    assert views["averaged"].passes == (10 * (1 + steps), 10 * (1 + steps))


def slope(view: View, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view.logits(leaf)[:, 0].sum(), leaf)
    return gradient


def test_the_smoothed_slope_is_that_of_the_relaxed_pipeline() -> None:
    """Central differences of f(x + r tanh(g(x) / T)), T being that of x. f is linear, so it has one slope."""
    f = linear_network([[2.0, 1.0], [-1.0, 3.0]]).double()
    critic = SmoothCritic().double()
    victim = behind(f, critic, 0.05)
    x = 0.2 + 0.3 * torch.rand(6, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def g(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(critic(f(leaf))[0].sum(), leaf)[0]

    temperature = usual_size(g(x))

    def relaxed(at: Tensor) -> Tensor:
        return f(at + 0.05 * torch.tanh(g(at) / temperature))[:, 0]

    with victim.frozen():
        found = slope(victim.views()["smoothed"], x)
        plain = slope(victim.views()["adaptive"], x)
    for way in (images((1.0, 0.0)).double(), images((0.3, -0.7)).double()):
        expected = (relaxed(x + 1e-6 * way) - relaxed(x - 1e-6 * way)) / 2e-6
        torch.testing.assert_close((found * way).flatten(1).sum(1), expected, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(found, plain, rtol=0.01)


def test_on_relu_networks_the_smoothed_slope_is_the_identity_backward() -> None:
    """The finding of ATTACKS 9.4: the critic's slope is piecewise constant, so there is nothing to smooth."""
    victim, _ = digits_system()
    x = digits()[0][:20]
    with victim.frozen():
        views = victim.views()
        torch.testing.assert_close(slope(views["smoothed"], x), slope(views["adaptive"], x))


def test_the_usual_size_is_the_median_of_what_is_not_zero() -> None:
    g = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -5.0]]).view(3, 1, 2, 2)
    assert usual_size(g).flatten().tolist() == [2.0, 1.0, 5.0]


def test_the_temperature_is_halved_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    victim, _ = digits_system()
    seen: list[float] = []
    plain = IMT.smoothed

    def watched(self: IMT, x: Tensor, temperature: float = 1.0) -> Tensor:
        seen.append(temperature)
        return plain(self, x, temperature)

    monkeypatch.setattr(IMT, "smoothed", watched)
    x, y = standing(victim, 2)
    SmoothedSign(steps=5, anneal=2, temperature=3.0, restarts=2)(victim, x, untargeted(y), TINY)
    assert seen == [3.0, 3.0, 1.5, 1.5, 0.75] * 2


def standing(victim: TorchSystem, n: int) -> tuple[Tensor, Tensor]:
    """Digits that the deployed system gets right, with their labels."""
    x, y = digits()
    right = victim.decide(x[:100]) == y[:100]
    return x[:100][right][:n], y[:100][right][:n]


# --- the mask ------------------------------------------------------------------------------------------------------


def masked(boundary: float, sign: float, at: float = 0.0) -> TorchSystem:
    """Two pixels. Class 1 where sign * (purified pixel 0 - boundary) > 0; z = 20 (pixel 1 - 0.5) + a little of pixel
    0, so IMT moves both pixels up, by half as much where z is in (-0.847, 0.847): pixel 1 in (0.4576, 0.5424)."""
    f = linear_network([[0.0, 0.0], [sign, 0.0], [0.0, 1.0]])
    f.head.bias = nn.Parameter(
        torch.tensor([0.0, -sign * boundary, -10.0])
    )  # class 2 carries pixel 1, and never wins
    return behind(f, LinearCritic([0.0, sign * 1e-3, 20.0], 190.0 + at), rule="interval")


@pytest.mark.parametrize(
    ("boundary", "sign", "start", "radius"),
    [
        (0.58, -1.0, (0.62, 0.6), 0.1),  # down to 0.52; half a step up is 0.57, a whole one 0.62
        (0.65, 1.0, (0.5, 0.5), 0.06),  # up to 0.56; a whole step up is 0.66, half a one 0.61
    ],
    ids=["into the band", "out of the band"],
)
def test_the_mask_is_part_of_what_is_attacked(
    boundary: float, sign: float, start: tuple[float, float], radius: float
) -> None:
    """The classes do not depend on the pixel that sets the mask, so plain ascent never touches it."""
    victim, x = masked(boundary, sign), images(start)
    assert victim.decide(x).tolist() == [0]
    threat = ThreatModel("linf", radius)
    blind = PGD(steps=20, random_start=False, objective="margin")(victim, x, ours(), threat)
    assert not blind.success.any() and torch.equal(blind.x_adv[..., 1], x[..., 1])
    assert MaskControl(steps=20, random_start=False)(victim, x, ours(), threat).success.all()


def test_the_guided_face_has_the_critics_own_slope() -> None:
    victim, _ = digits_system()
    x = digits()[0][:6]
    view = guided(victim.views()["adaptive"], imt_of(victim))
    with victim.frozen():
        leaf = x.clone().requires_grad_()
        out = view.logits(leaf)
        (found,) = torch.autograd.grad(out[:, -1].sum(), leaf, retain_graph=True)
        (classes,) = torch.autograd.grad(out[:, 0].sum(), leaf)
        z, _ = imt_of(victim).readout(leaf)
        (expected,) = torch.autograd.grad(z.sum(), leaf)
        torch.testing.assert_close(out[:, -1], z)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(classes, slope(victim.views()["adaptive"], x))
        assert torch.equal(view.labels(out, leaf), victim.decide(x))


# --- the published table ------------------------------------------------------------------------------------------


def crossed(n: int = 1) -> tuple[TorchSystem, Tensor, Goal]:
    """Class 1 grows with both pixels, and z is minus its logit."""
    f = linear_network([[0.0, 0.0], [1.0, 0.1]])
    return behind(f, LinearCritic([0.0, -1.0]), 0.0), images(*[(0.5, 0.5)] * n), ours(n=n)


STILL: dict[str, Any] = {"random_start": False}
CRITIC_ONLY: dict[str, Any] = {"class_steps": 0, "critic_steps": 1}


@pytest.mark.parametrize(
    ("attack", "moved"),
    [
        # "adversarial" is where z falls, and class 1 grows: up in both pixels.
        (PublishedATLD(**STILL, towards="adversarial"), (0.1, 0.1)),
        (PublishedATLD(**STILL, towards="clean", weight=0.5), (0.1, 0.1)),  # the class loss outweighs it
        (PublishedATLD(**STILL, towards="clean", weight=50.0), (-0.1, -0.1)),
        (PublishedATLD(**STILL, joint=False, critic_steps=1, towards="adversarial"), (0.1, 0.1)),
        (PublishedATLD(**STILL, joint=False, critic_steps=1, towards="clean"), (0.075, 0.075)),
        (PublishedATLD(**STILL, **CRITIC_ONLY, critic_relative_step=1.0, towards="clean"), (-0.1, -0.1)),
        (PublishedATLD(**STILL, **CRITIC_ONLY, towards="adversarial"), (0.025, 0.025)),
        (PublishedATLD(**STILL, class_steps=0, critic_steps=3, towards="adversarial"), (0.075, 0.075)),
        (PublishedATLD(**STILL, class_steps=1, relative_step=1.0, joint=False, objective="margin"), (0.1, 0.1)),
    ],
)  # fmt: skip
def test_the_tables_attacks_step_where_it_says(attack: PublishedATLD, moved: tuple[float, float]) -> None:
    victim, x, goal = crossed()
    found = attack(victim, x, goal, ThreatModel("linf", 0.1)).x_adv
    torch.testing.assert_close(found, x + images(moved))


def test_without_the_critic_it_is_plain_pgd_on_the_classifier() -> None:
    victim, _ = digits_system()
    x, y = standing(victim, 20)
    threat, goal = ThreatModel("linf", 0.1), untargeted(y)
    mine = PublishedATLD(**STILL, weight=0.0, towards="clean")(victim, x, goal, threat).x_adv
    plain = PGD(steps=20, relative_step=0.25, keep="last", **STILL)(victim, x, goal, threat, view="static").x_adv
    assert torch.equal(mine, plain)


def test_the_other_way_is_tried_where_the_first_failed() -> None:
    """Two images: one that only the way to "clean" fells, one that only the other does."""
    f = linear_network([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    f.head.bias = nn.Parameter(torch.tensor([0.0, -0.65, 0.35]))  # class 0 in (0.35, 0.65) of pixel 0
    victim, x = behind(f, LinearCritic([0.0, 1.0, 0.0]), 0.0), images((0.6, 0.5), (0.4, 0.5))
    how = {**STILL, "class_steps": 0, "critic_steps": 1, "critic_relative_step": 1.0}
    threat = ThreatModel("linf", 0.1)
    success = {
        way: PublishedATLD(**how, towards=way)(victim, x, ours(n=2), threat).success.tolist()  # type: ignore[arg-type]
        for way in ("clean", "adversarial")
    }
    assert success == {"clean": [True, False], "adversarial": [False, True]}
    both = PublishedATLD(**how)(victim, x, ours(n=2), threat)
    assert both.success.all()
    torch.testing.assert_close(both.x_adv, images((0.7, 0.5), (0.3, 0.5)))
    # One step each way, one question between them; the deployed decision is two forwards and a gradient.
    assert both.cost.forwards.tolist() == [1 + 2, 2 + 2] and both.cost.backwards.tolist() == [1 + 1, 2 + 1]
    assert both.cost.queries.tolist() == [1, 1]


# --- all of them --------------------------------------------------------------------------------------------------


def test_the_limited_form_has_one_procedure_more_and_only_the_papers_are_marked() -> None:
    full, limited = procedures("full"), procedures("interval")
    assert set(limited) - set(full) == {"mask_control"} and set(full) < set(limited)
    assert {name for name, attack in limited.items() if attack.published} == {n for n in full if n[:6] == "table5"}
    victim, _ = digits_system("full")
    assert set(victim.adaptive_attacks()) == set(full)
    assert victim.offers == {"gradient", "scores", "labels", "purification", "critic"}
    assert digits_system("interval")[0].offers - victim.offers == {"band"}


QUICK: dict[str, Any] = {"steps": 4}
ON_IMT: list[tuple[Attack, int, int]] = [
    # (attack, forwards of the head, backwards counted) for an image that never falls: an adaptive look is 2 forwards
    # and 2 backwards, a static one 1 and 1, a question 2 forwards; the verification adds 2 and 1.
    (SmoothedSign(**QUICK), 8 + 2, 4 * 4 + 1),
    (MaskControl(**QUICK, weights=(1.0, 10.0)), 4 * 8 + 3 * 2 + 2, 4 * 8 + 1),
    (PublishedATLD(class_steps=4), 8 + 2 + 2, 8 + 1),
    (PublishedATLD(class_steps=4, joint=False, critic_steps=2), 4 + 4 + 2 + 2, 8 + 1),
    (PreCompensation(**QUICK, iterations=3), 4 + 1 + 4 * 2 + 2, 4 + 1),
]


@pytest.mark.parametrize(("attack", "forwards", "backwards"), ON_IMT, ids=lambda p: getattr(type(p), "__name__", ""))
def test_every_forward_is_counted(attack: Attack, forwards: int, backwards: int) -> None:
    victim, counter = digits_system()
    x, y = standing(victim, 10)
    counter.forwards.clear()
    result = attack(victim, x, untargeted(y), TINY)
    assert not result.success.any()
    assert sum(counter.forwards) == forwards * 10
    static_looks = 1 if isinstance(attack, PreCompensation) else 0  # the one query that asks the classifier alone
    assert (result.cost.forwards + 2 * result.cost.queries - static_looks).tolist() == [forwards] * 10
    assert result.cost.backwards.tolist() == [backwards] * 10
    bound = attack.passes(victim.views()["adaptive"], 10)
    spent = (result.cost.forwards.sum() - 20, result.cost.backwards.sum() - 10, result.cost.queries.sum())
    assert all(int(s) == b for s, b in zip(spent, bound, strict=True))


@pytest.mark.parametrize("name", procedures("interval"))
def test_every_procedure_stays_within_its_bound_and_its_ball(name: str) -> None:
    victim, _ = digits_system()
    x, y = standing(victim, 12)
    threat, attack = ThreatModel("linf", 0.08), victim.adaptive_attacks()[name]
    result = attack(victim, x, untargeted(y), threat, seed=3)  # the base class checks the ball
    bound = attack.passes(victim.views()["adaptive"], 12)
    spent = (result.cost.forwards.sum() - 24, result.cost.backwards.sum() - 12, result.cost.queries.sum())
    assert all(int(s) <= b for s, b in zip(spent, bound, strict=True))
    again = attack(victim, x, untargeted(y), threat, seed=3)
    assert torch.equal(again.x_adv, result.x_adv)


@pytest.mark.parametrize("attack", [SmoothedSign(), MaskControl(), PublishedATLD()])
def test_they_are_refused_where_their_part_is_missing(attack: Attack) -> None:
    f = linear_network([[0.0, 0.0], [1.0, 0.1]])
    plain = TorchSystem(f, input_shape=(1, 1, 2), num_classes=2)
    with pytest.raises(UserError, match=r"needs (critic|band), and classifier offers only"):
        attack(plain, images((0.5, 0.5)), ours(), TINY)
    full, x, goal = crossed()
    with pytest.raises(UserError, match="MaskControl needs band"):
        MaskControl()(full, x, goal, TINY)
    assert {"gradient", "purification"} == KNOWS
