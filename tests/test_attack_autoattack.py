"""AutoAttack: which attack meets which image, what it all costs, and the six diagnostics."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, system, trained_network
from test_attack_adaptive import imt_system
from test_attack_engine import Inexact, standing
from test_attack_gradient import away_from, linear_problem
from torch import Tensor, nn

from casemate.attacks import diagnostics
from casemate.attacks.apgd import APGD, APGDT
from casemate.attacks.autoattack import AutoAttack
from casemate.attacks.diagnostics import AttackWarning
from casemate.attacks.gradient import PGD
from casemate.evaluation.gate import verdicts
from casemate.evaluation.ledger import Cell
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import Planned
from casemate.system import View
from casemate.threat import ThreatModel, targeted, untargeted

SMALL = {"steps": 6, "targets": 2, "queries": 20, "diagnose": False}
LINF = ThreatModel("linf", 0.1)


# --- the ensemble -------------------------------------------------------------------------------------------------


def test_an_image_that_stands_costs_what_the_standard_version_does() -> None:
    """101 + 909 looks of APGD, 900 steps of FAB-T with 900 checks, 5,001 queries, and one look at the clean image."""
    victim, counter, x, goal = standing(1)
    paid: list[Tensor] = []
    for parameter in counter.parameters():
        parameter.register_hook(paid.append)
    attack = AutoAttack(diagnose=False)
    result = attack(victim, x, goal, ThreatModel("linf", 0.001))
    assert len(counter.forwards) == 1 + 101 + 909 + 900 + 900 + 5001 + 1
    assert len(counter.gradients) == 100 + 900 + 900
    assert not paid and all(p.grad is None for p in counter.parameters())
    assert (result.cost.forwards.item(), result.cost.backwards.item()) == (1900 + 1, 1900)
    assert result.cost.queries.item() == 1 + 10 + 900 + 5001
    assert attack.passes(victim.views()["adaptive"], 1) == (1900, 1900, 5912)


def test_each_attack_only_meets_what_still_stands() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim, goal = system(counter, (1, 8, 8), 10), untargeted(y[:80])
    result = AutoAttack(**SMALL)(victim, x[:80], goal, LINF)
    sizes = list(counter.forwards)
    wrong = victim.decide(x[:80]) != y[:80]
    assert sizes[0] == sizes[-1] == 80 and sizes[1] == int((~wrong).sum()) < 80
    assert sizes[1:-1] == sorted(sizes[1:-1], reverse=True) and 0 < sizes[-2] < sizes[1]
    assert sizes[-2] >= int((~result.success).sum())
    assert sum(sizes[:-1]) == int((result.cost.forwards - 1 + result.cost.queries).sum())
    assert sum(counter.gradients) == int(result.cost.backwards.sum())
    assert torch.equal(result.x_adv[wrong], x[:80][wrong]) and result.success[wrong].all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_linear_classes_what_stands_is_what_is_out_of_reach(norm: Any) -> None:
    victim, x, y, linf, l2 = linear_problem(5)
    distances = linf if norm == "linf" else l2
    radius = float(distances.median())
    clear = away_from(distances, radius)
    for version in ("standard", "screen"):
        attack = AutoAttack(version=version, steps=40, queries=20)  # type: ignore[arg-type]
        result = attack(victim, x, untargeted(y), ThreatModel(norm, radius))
        assert torch.equal(result.success[clear], (distances < radius)[clear])


def test_it_is_at_least_as_strong_as_its_parts_and_pgd() -> None:
    x, y = digits()
    victim, goal = system(trained_network(), (1, 8, 8), 10), untargeted(y[1500:1600])
    threat = ThreatModel("linf", 0.08)
    fallen = [
        int(attack(victim, x[1500:1600], goal, threat).success.sum())
        for attack in (PGD(steps=20), APGD(steps=20), APGDT(steps=20), AutoAttack(steps=20, queries=50))
    ]
    assert fallen[0] <= fallen[1] + 1 and max(fallen) == fallen[3] and 20 < fallen[3] < 100


def test_the_screen_is_the_first_two_attacks_and_an_upper_bound() -> None:
    victim, counter, x, goal = standing(2)
    result = AutoAttack(version="screen", **SMALL)(victim, x, goal, ThreatModel("linf", 0.001))
    assert counter.forwards == [2] * (1 + 7 + 14 + 1) and counter.gradients == [2] * 18
    assert result.cost.queries.tolist() == [4] * 2
    screen, full = AutoAttack(version="screen", **SMALL), AutoAttack(**SMALL)
    assert screen.passes(victim.views()["adaptive"], 2) == (36, 36, 8)
    assert screen.upper_bound and not full.upper_bound and not APGD().upper_bound
    assert screen.parameters() != full.parameters()
    rows = {"index": torch.arange(3).numpy(), "success": torch.tensor([True, False, False]).numpy()}
    cells = [
        Finished(Planned(name, "core", "autoattack", attack, LINF, "adaptive", 3), Cell({}, rows, 3, 64))
        for name, attack in (("screen", screen), ("full", full))
    ]
    assert verdicts(cells) == ["upper bound", "ok"]


def test_a_targeted_goal_has_one_target() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim, target = system(counter, (1, 8, 8), 10), (y[:40] + 1) % 10
    result = AutoAttack(**SMALL)(victim, x[:40], targeted(y[:40], target), ThreatModel("linf", 0.2))
    assert torch.equal(result.prediction[result.success], target[result.success]) and result.success.sum() > 3
    assert len(counter.forwards) == 1 + 7 + 7 + 12 + 21 + 1


def test_on_a_view_that_is_not_exact_every_image_meets_every_attack() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim = Inexact(counter, input_shape=(1, 8, 8), num_classes=10)
    attack = AutoAttack(**SMALL)
    result = attack(victim, x[:20], untargeted(y[:20]), LINF)
    assert counter.forwards == [20] * (1 + 7 + 14 + 24 + 21 + 1) and counter.gradients == [20] * 30
    assert attack.passes(victim.views()["adaptive"], 20) == (600, 600, 20 * (1 + 3 + 12 + 21))
    assert result.cost.forwards.tolist() == [31] * 20 and LINF.contains(result.x_adv, x[:20]).all()
    exact = AutoAttack(**SMALL)(system(trained_network(), (1, 8, 8), 10), x[:20], untargeted(y[:20]), LINF)
    assert int(result.success.sum()) >= int(exact.success.sum()) - 1


def test_results_follow_the_seed() -> None:
    x, y = digits()
    victim, goal = system(trained_network(), (1, 8, 8), 10), untargeted(y[:20])
    one, again, other = (AutoAttack(**SMALL)(victim, x[:20], goal, LINF, seed).x_adv for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


# --- diagnostics --------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount, self.rng = amount, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = trained_network()(x)
        return out + self.amount * torch.randn(out.shape, generator=self.rng)


def face(model: Any) -> View:
    return View("static", model, True, frozenset({"gradient", "scores", "labels"}))


def test_randomness_is_seen_in_decisions_or_in_logits() -> None:
    x, y = digits()
    goal = untargeted(y[:50])
    assert diagnostics.randomness(face(trained_network()), x[:50], goal) == []
    for amount in (0.01, 10.0):
        (line,) = diagnostics.randomness(face(Noisy(amount)), x[:50], goal)
        assert "differently each time" in line
    counter = Counter(trained_network())
    diagnostics.randomness(face(counter), x[:50], goal)
    assert counter.forwards == [50] * 5


def test_probabilities_are_seen() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert diagnostics.softmax_output(logits) == [] == diagnostics.softmax_output(logits.sigmoid())
    (line,) = diagnostics.softmax_output(logits.softmax(1))
    assert "probabilities" in line


def test_test_time_optimisation_is_seen_however_it_is_called() -> None:
    x, _ = digits()
    grad = torch.autograd.grad

    def direct(z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            grad(trained_network()(leaf).sum(), leaf)
        return torch.zeros(len(z), 10)

    def backward(z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            trained_network()(leaf).sum().backward(inputs=[leaf])
        return torch.zeros(len(z), 10)

    assert diagnostics.gradients_inside(face(trained_network()), x[:2]) == []
    imt = imt_system(trained_network())
    for model in (direct, backward, imt.views()["adaptive"].logits):
        (line,) = diagnostics.gradients_inside(face(model), x[:2])
        assert "takes gradients in its forward pass" in line
    assert diagnostics.gradients_inside(imt.views()["static"], x[:2]) == []
    mine: list[str] = []

    def own(*event: Any) -> None:
        mine.append(event[1])

    sys.setprofile(own)
    try:
        diagnostics.gradients_inside(face(trained_network()), x[:2])
        assert sys.getprofile() is own
    finally:
        sys.setprofile(None)


def test_too_few_classes_and_labels_without_an_output_are_seen() -> None:
    labels = torch.tensor([0, 1])
    assert diagnostics.class_count(torch.zeros(2, 4), labels) == []
    assert "3 classes" in diagnostics.class_count(torch.zeros(2, 3), labels)[0]
    assert "2 classes there is no DLR" in diagnostics.class_count(torch.zeros(2, 2), labels)[0]
    assert diagnostics.class_count(torch.zeros(2, 4), torch.tensor([0, 7])) == [
        "label 7 has no output: the system has 4"
    ]


def test_zero_gradients_and_square_have_their_thresholds() -> None:
    assert diagnostics.silent_gradients(0, 100) == []
    assert "1 of 100 images" in diagnostics.silent_gradients(1, 100)[0]
    assert diagnostics.square_improves(500, 498, 1000) == []
    assert "felled 3 of 500 images" in diagnostics.square_improves(500, 497, 1000)[0]


class Quantised(nn.Module):
    """Rounds to eight levels of grey: no slope anywhere, and nothing that a random search would mind."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = trained_network()((x * 8).round() / 8)
        return out


def test_masked_gradients_are_said_and_felled_by_square_alone() -> None:
    x, y = digits()
    right = Quantised()(x).argmax(1) == y
    counter = Counter(Quantised())
    victim, goal = system(counter, (1, 8, 8), 10), untargeted(y[right][:60])
    attack = AutoAttack(steps=3, targets=2, queries=150)
    with pytest.warns(AttackWarning) as said:
        result = attack(victim, x[right][:60], goal, ThreatModel("linf", 0.15))
    lines = [str(w.message) for w in said]
    assert any("images have an input gradient of zero" in line for line in lines)
    assert any(line.startswith("Square, which sees no gradient, felled") for line in lines)
    assert len(lines) == 2 and result.success.float().mean() > 0.3
    assert sum(counter.forwards) == int((result.cost.forwards + result.cost.queries).sum())


def test_a_sound_network_is_not_warned_of_and_no_warning_stops_an_attack() -> None:
    x, y = digits()
    goal, attack = untargeted(y[:10]), AutoAttack(steps=2, targets=1, queries=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(system(trained_network(), (1, 8, 8), 10), x[:10], goal, ThreatModel("linf", 0.01))
        AutoAttack(**SMALL)(system(Quantised(), (1, 8, 8), 10), x[:10], goal, LINF)  # it was told not to look
    imt = imt_system(trained_network())
    with pytest.warns(AttackWarning, match="optimises at test time"):
        result = attack(imt, x[:10], goal, LINF)
    view = imt.views()["adaptive"]
    assert view.passes == (2, 2) and int(result.cost.backwards.sum()) % 2 == 0
    with pytest.warns(AttackWarning, match="differently each time"):
        attack(system(Noisy(0.5), (1, 8, 8), 10), x[:10], goal, LINF)
