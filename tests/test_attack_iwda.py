"""IWDA for each picture, by networks and by the sliced distance: losses, bounds, passes, budgets and mistakes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attack_toys import Counter, system
from iwda_toys import LINF, SHAPE, network, pictures, victim
from pydantic import ValidationError
from torch import Tensor

import casemate.attacks.iwda as iwda
from casemate import registry
from casemate.attacks.base import Attack, Cost
from casemate.attacks.gradient import PGD
from casemate.attacks.internal import IWDBudget, apart
from casemate.attacks.iwda import IWDA, QUICK, Resynthesis
from casemate.attacks.iwda_sliced import IWDASliced
from casemate.attacks.pyramid import classification_loss
from casemate.errors import UserError
from casemate.objectives import margin
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel, targeted, untargeted

SMALL: dict[str, Any] = {"coarsest": 12, "scales": 2, "narrowest": 8, "steps": 2, "samples": 2}
SLICED: dict[str, Any] = {"coarsest": 8, "scales": 3, "window": 5, "steps": 30}
BOTH: tuple[Attack, ...] = (IWDA(**SMALL), IWDASliced(**{**SLICED, "steps": 4}))
NAMES = [type(attack).__name__ for attack in BOTH]


# --- the classification loss ----------------------------------------------------------------------------------------


def test_the_classification_loss_leads_off_the_label_or_to_the_target() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    total = math.log(math.exp(2) + math.exp(1) + 1)
    away, towards = untargeted(torch.tensor([0])), targeted(torch.tensor([0]), torch.tensor([2]))
    assert classification_loss(logits, away, "ce", 5.0).item() == pytest.approx(-(total - 2))
    assert classification_loss(logits, towards, "ce", 5.0).item() == pytest.approx(total)
    assert classification_loss(logits, away, "margin", 5.0).item() == pytest.approx(1)
    assert classification_loss(logits, towards, "margin", 5.0).item() == pytest.approx(2)


def test_a_fooled_picture_pays_no_more_than_the_cap() -> None:
    fooled, goal = torch.tensor([[0.0, 20.0]]), untargeted(torch.tensor([0]))
    for name in ("ce", "margin"):
        assert classification_loss(fooled, goal, name, 5.0).item() == -5  # type: ignore[arg-type]
        assert classification_loss(fooled, goal, name, None).item() == pytest.approx(-20, abs=1e-4)  # type: ignore[arg-type]


# --- mode S ---------------------------------------------------------------------------------------------------------


def test_loops_run_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pictures(3)
    critics: list[int] = []
    once = iwda.critic_loss
    monkeypatch.setattr(iwda, "critic_loss", lambda *a, **k: (critics.append(len(a[1])), once(*a, **k))[1])
    counter = Counter(network())
    attack = IWDA(**SMALL, critic_steps=3, generator_steps=2)
    result = attack(system(counter, SHAPE, 10), x, untargeted(y), LINF)
    assert critics == [3] * (2 * 2 * 3)  # scales, steps, critic steps: not one more
    assert counter.gradients == [3] * (2 * 2 * 2)
    assert counter.forwards == [3] * (1 + 8 + 2 + 1)  # a clean look, the generators, two samples, the verification
    assert result.cost.forwards.tolist() == [9] * 3 and result.cost.backwards.tolist() == [8] * 3
    assert result.cost.queries.tolist() == [3] * 3
    assert attack.passes(victim().views()["adaptive"], 3) == (24, 24, 9)
    late = IWDA(**SMALL, adversarial_scales=1)
    assert late(victim(), x, untargeted(y), LINF).cost.backwards.tolist() == [6] * 3
    assert late.passes(victim().views()["adaptive"], 1) == (6, 6, 3)
    assert IWDA(**SMALL, tau=0.0).passes(victim().views()["adaptive"], 1) == (0, 0, 3)


CHANGES: list[dict[str, Any]] = [
    {"tau": 3.0}, {"objective": "margin"}, {"reconstruction": 0.0}, {"penalty": 5.0}, {"penalty_norm": "image"},
    {"critic_norm": True}, {"steps": 2}, {"critic_steps": 1}, {"generator_steps": 1}, {"rate": 5e-3}, {"beta": 0.9},
    {"coarsest": 14}, {"largest": 14}, {"scales": 1}, {"start": 1}, {"adversarial_scales": 1}, {"narrowest": 4},
    {"samples": 9}, {"radius": 0.02},
]  # fmt: skip


def test_every_option_changes_what_is_made() -> None:
    x, y = pictures(1)
    options = {**SMALL, "steps": 1}
    base = IWDA(**options)(victim(), x, untargeted(y), LINF).x_adv
    for change in CHANGES:
        made = IWDA(**{**options, **change})(victim(), x, untargeted(y), LINF).x_adv
        assert not torch.equal(made, base), change
    both = [IWDA(**{**options, "scales": 5, "widest": w})(victim(), x, untargeted(y), LINF).x_adv for w in (8, 16)]
    assert not torch.equal(*both)  # the fifth scale is the first that is wider


def test_a_cap_takes_the_slope_from_what_is_fooled() -> None:
    x, y = pictures(1)
    goal = untargeted(y)
    capped, free, none = (IWDA(**SMALL, cap=c, tau=t) for c, t in ((0.0, 3.0), (None, 3.0), (None, 0.0)))
    made = [attack(victim(), x, goal, LINF).x_adv for attack in (capped, free, none)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[1], made[2])


def test_the_classifier_pulls_samples_off_the_label() -> None:
    """Only what exceeds tau = 0 is the attack's doing."""
    x, y = pictures(6)
    once: dict[str, Any] = {"critic_steps": 1, "generator_steps": 2, "start": 1, "objective": "margin"}
    options: dict[str, Any] = {**SMALL, **once, "steps": 20, "rate": 5e-3}
    pulled, alone = (IWDA(**options, tau=tau)(victim(), x, untargeted(y), LINF) for tau in (3.0, 0.0))
    assert int(pulled.success.sum()) >= 5 and int(alone.success.sum()) <= 2


def test_reconstruction_brings_the_anchor_to_the_picture() -> None:
    x, y = pictures(2)
    errors = []
    for weight in (10.0, 0.0):
        attack = IWDA(**{**SMALL, "scales": 1, "steps": 15, "critic_steps": 1, "rate": 5e-3}, reconstruction=weight)
        run = Resynthesis(attack, victim().views()["adaptive"], x, untargeted(y), 0, [0, 1], Cost.zero(2))
        run.run()
        with torch.no_grad():
            errors.append((run.shown(run.pictures.image(0, fixed=True)) - x).square().mean())
    assert errors[0] < 0.8 * errors[1]


def test_pictures_do_not_feel_each_other() -> None:
    x, y = pictures(3)
    together = IWDA(**SMALL)(victim(), x, untargeted(y), LINF, seed=3)
    labels = torch.tensor([(int(y[0]) + 1) % 10, int(y[1]), (int(y[2]) + 1) % 10])  # two are wrong from the start
    alone = IWDA(**SMALL)(victim(), x, untargeted(labels), LINF, seed=3)
    assert torch.equal(alone.x_adv[[0, 2]], x[[0, 2]]) and alone.success[[0, 2]].all()
    assert alone.cost.backwards.tolist() == [0, 12, 0]
    assert torch.allclose(alone.x_adv[1], together.x_adv[1], atol=1e-3)
    singly = IWDA(**SMALL, at_once=1)(victim(), x, untargeted(y), LINF, seed=3)
    assert torch.allclose(singly.x_adv, together.x_adv, atol=1e-3)


def test_quick_is_a_setting_of_it() -> None:
    attack = IWDA(**QUICK)
    assert [s[0] for s in attack.sizes(128, 128)] == [25, 38, 57, 86, 128]
    assert attack.sizes(224, 224)[-1] == (128, 128)
    big = TorchSystem(network(), input_shape=(3, 128, 128), num_classes=10)
    assert attack.passes(big.views()["adaptive"], 1) == (200, 200, 11)


# --- the sliced distance --------------------------------------------------------------------------------------------


def test_at_equal_success_it_stays_nearer_than_pgd_in_distances_over_patches() -> None:
    x, y = pictures(8)
    sliced = IWDASliced(**SLICED)(victim(), x, untargeted(y), LINF)
    pgd = next(
        result
        for radius in (0.1, 0.15, 0.2, 0.25, 0.3)
        if (result := PGD(steps=20)(victim(), x, untargeted(y), ThreatModel("linf", radius))).success.all()
    )
    assert sliced.success.all()
    assert apart(sliced.x_adv, x, 5).mean() < 0.7 * apart(pgd.x_adv, x, 5).mean()


def test_the_sliced_attack_costs_a_pass_per_step() -> None:
    x, y = pictures(2)
    counter = Counter(network())
    attack = IWDASliced(**{**SLICED, "steps": 4})
    result = attack(system(counter, SHAPE, 10), x, untargeted(y), LINF)
    assert counter.gradients == [2] * 12 and counter.forwards == [2] * 14
    assert result.cost.forwards.tolist() == [13] * 2 and result.cost.backwards.tolist() == [12] * 2
    assert attack.passes(victim().views()["adaptive"], 2) == (24, 24, 2)


SLICED_CHANGES: list[dict[str, Any]] = [
    {"tau": 1.0}, {"objective": "ce", "cap": 5.0}, {"window": 7}, {"projections": 8}, {"steps": 3}, {"rate": 0.02},
    {"start": 0.05}, {"coarsest": 12}, {"scales": 2}, {"radius": 0.01},
]  # fmt: skip


def test_every_option_of_the_sliced_attack_changes_what_is_made() -> None:
    x, y = (part[3:] for part in pictures(4))  # one that does not fall to the first difference
    options = {**SLICED, "steps": 8}
    base = IWDASliced(**options)(victim(), x, untargeted(y), LINF).x_adv
    for change in SLICED_CHANGES:
        made = IWDASliced(**{**options, **change})(victim(), x, untargeted(y), LINF).x_adv
        assert not torch.equal(made, base), change
    one, two = (IWDASliced(**{**options, "cap": c})(victim(), x, untargeted(y), LINF).x_adv for c in (0.0, 9.0))
    assert not torch.equal(one, two)


def test_a_target_is_reached_and_others_do_not_count() -> None:
    x, y = pictures(4)
    targets = (y + 3) % 10
    result = IWDASliced(**SLICED, tau=1.0)(victim(), x, targeted(y, targets), LINF)
    assert result.success.all() and torch.equal(result.prediction, targets)


def test_a_hard_budget_is_kept_at_the_price_of_success() -> None:
    x, y = pictures(4)
    tight, loose = (IWDASliced(**SLICED, radius=r)(victim(), x, untargeted(y), LINF) for r in (0.01, 0.08))
    assert tight.witness is not None and tight.witness.shape == (4, 12 * 12)
    assert IWDBudget(0.01, 5).contains(tight.x_adv, x, tight.witness).all()
    assert IWDBudget(0.08, 5).contains(loose.x_adv, x).all()
    assert int(tight.success.sum()) < int(loose.success.sum())


# --- both -----------------------------------------------------------------------------------------------------------


def test_the_pyramids_hard_budget_is_kept_too() -> None:
    x, y = pictures(2)
    attack = IWDA(**SMALL, radius=0.03)
    result = attack(victim(), x, untargeted(y), LINF)
    assert result.witness is not None and IWDBudget(0.03).contains(result.x_adv, x, result.witness).all()
    assert not torch.equal(result.x_adv, x) and str(attack.budget(LINF)) == "IWD 0.03, 11x11 patches"
    assert IWDA(**SMALL)(victim(), x, untargeted(y), LINF).witness is None


@pytest.mark.parametrize("attack", BOTH, ids=NAMES)
def test_constant_pictures_give_numbers(attack: Attack) -> None:
    x = torch.stack([torch.zeros(SHAPE), torch.full(SHAPE, 0.4), torch.ones(SHAPE)])
    result = attack(victim(), x, untargeted(victim().decide(x)), LINF)
    assert result.x_adv.isfinite().all() and result.x_adv.amin() >= 0 and result.x_adv.amax() <= 1


@pytest.mark.parametrize("attack", BOTH, ids=NAMES)
def test_a_picture_that_is_wrong_at_once_stays_as_it_is(attack: Attack) -> None:
    x, y = pictures(2)
    result = attack(victim(), x, untargeted((y + 1) % 10), LINF)
    assert torch.equal(result.x_adv, x) and result.success.all() and not result.cost.backwards.any()


@pytest.mark.parametrize("attack", BOTH, ids=NAMES)
def test_seeds_decide_and_the_global_one_is_left_alone(attack: Attack) -> None:
    x, y = pictures(1)
    state = torch.get_rng_state()
    one, again, other = (attack(victim(), x, untargeted(y), LINF, seed).x_adv for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


class Inexact(TorchSystem):
    def views(self) -> dict[str, View]:
        return {name: View(name, self.classifier, False, self.offers) for name in ("static", "adaptive")}


@pytest.mark.parametrize("attack", BOTH, ids=NAMES)
def test_on_a_view_that_is_not_exact_nothing_is_skipped_and_the_highest_margin_kept(attack: Attack) -> None:
    x, y = pictures(2)
    seen: list[Tensor] = []

    class Watched(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = network()(x)
            seen.append(margin(out.detach(), untargeted(y)))
            return out

    result = attack(Inexact(Watched(), input_shape=SHAPE, num_classes=10), x, untargeted(y), LINF)
    judged = torch.stack(seen[:-1] if isinstance(attack, IWDASliced) else seen[-3:-1])
    assert torch.allclose(margin(network()(result.x_adv), untargeted(y)), judged.amax(0), atol=1e-4)


@pytest.mark.parametrize("attack", BOTH, ids=NAMES)
def test_mistakes_are_named_in_one_line(attack: Attack) -> None:
    x, y = pictures(2)
    name = {"IWDA": "iwda", "IWDASliced": "iwda_sliced"}[type(attack).__name__]
    with pytest.raises(
        UserError, match=f"{name}: a target must differ from the label, and picture 1 has {int(y[1])}"
    ):
        attack(victim(), x, targeted(y, torch.stack([(y[0] + 1) % 10, y[1]])), LINF)
    small = system(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 10)), (1, 4, 4), 10)
    with pytest.raises(UserError, match=f"{name}: pictures of 4x4 are smaller than a patch of") as caught:
        attack(small, torch.rand(1, 1, 4, 4), untargeted(torch.tensor([0])), LINF)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValidationError, match="1 validation error"):
        registry.check("attack", name, {"tau": -1})


def test_a_start_beyond_the_pyramid_is_refused() -> None:
    x, y = pictures(1)
    with pytest.raises(UserError, match="iwda: start must be below 2, the number of scales, and is 2"):
        IWDA(**SMALL, start=2)(victim(), x, untargeted(y), LINF)
