"""Carlini-Wagner l2 and its Adam form in linf, against distances worked out by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from evaluation_toys import images, linear
from test_attack_gradient import away_from, linear_problem
from torch import Tensor, nn

from casemate.attacks.carlini_wagner import CWL2, CWAdam, Weight
from casemate.attacks.diagnostics import AttackWarning
from casemate.attacks.gradient import PGD
from casemate.errors import UserError
from casemate.evaluation import robustness
from casemate.evaluation.ledger import Ledger
from casemate.system import View
from casemate.threat import Goal, ThreatModel, targeted, untargeted

FAR = ThreatModel("l2", 100.0)
LINF = ThreatModel("linf", 0.1)


def l2(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv - x).flatten(1).norm(dim=1)


def test_it_finds_the_distance_to_a_linear_boundary() -> None:
    """Two classes: (z_y - z_j) / ||w_y - w_j||_2, within two percent and never below."""
    victim, x, y, _, distances = linear_problem(2)
    result = CWL2(steps=250, rate=0.02)(victim, x, untargeted(y), FAR)
    ratio = l2(result.x_adv, x) / distances
    assert bool(result.success.all())
    assert float(ratio.min()) > 0.9999 and float(ratio.max()) < 1.02


def test_too_few_steps_for_black_and_white_pixels_are_remarked() -> None:
    victim, x, y, _, _ = linear_problem(2)
    x, threat = x.round(), ThreatModel("l2", 1.0)
    with pytest.warns(AttackWarning, match=r"100% of them are\); 725 steps, or rate 0.18, do"):
        stuck = CWL2(steps=40, rounds=1)(victim, x, untargeted(y), threat)
    assert float(l2(stuck.x_adv, x).max()) < 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CWL2(steps=40, rounds=1, rate=0.2)(victim, x, untargeted(y), threat)
        CWL2(steps=40, rounds=1)(victim, 0.2 + 0.6 * x, untargeted(y), threat)


def test_it_finds_the_distance_to_each_target() -> None:
    """The boundary with class t, for images whose nearest point on it no third class claims."""
    victim, x, y, _, _ = linear_problem(3)
    weight = victim.classifier[1].weight.detach()
    z, tried = victim.logits(x).detach(), 0
    for target in range(3):
        apart = weight[y] - weight[target]
        gap = z.gather(1, y[:, None])[:, 0] - z[:, target]
        distance = gap / apart.norm(dim=1)
        foot = x.flatten(1) - (distance / apart.norm(dim=1))[:, None] * apart
        there, third = foot @ weight.T, (3 - y - target).clamp(0, 2)
        clear = (y != target) & (there.gather(1, third[:, None])[:, 0] < there[:, target] - 0.05)
        clear &= ((foot > 0.05) & (foot < 0.95)).all(1) & (distance > 0.03)  # nearer, Adam's step is too long
        tried += int(clear.sum())
        goal = targeted(y[clear], torch.full_like(y, target)[clear])
        result = CWL2(steps=250, rate=0.02)(victim, x[clear], goal, FAR)
        ratio = l2(result.x_adv, x[clear]) / distance[clear]
        assert bool((result.prediction == target).all())
        assert float(ratio.min()) > 0.9999 and float(ratio.max()) < 1.02
    assert tried > 15


def test_kappa_asks_for_that_margin() -> None:
    victim, x, y, _, _ = linear_problem(2)
    weight = victim.classifier[1].weight.detach()
    with torch.no_grad():
        before = victim.logits(x).gather(1, y[:, None])[:, 0] - victim.logits(x).gather(1, 1 - y[:, None])[:, 0]
        found = CWL2(steps=250, kappa=0.5, rate=0.03)(victim, x, untargeted(y), FAR)
        after = victim.logits(found.x_adv).gather(1, 1 - y[:, None])[:, 0]
        after -= victim.logits(found.x_adv).gather(1, y[:, None])[:, 0]
    ratio = l2(found.x_adv, x) * (weight[0] - weight[1]).norm() / (before + 0.5)
    inside = ((found.x_adv > 0.02) & (found.x_adv < 0.98)).flatten(1).all(1)
    assert int(inside.sum()) > 20 and float(after.min()) >= 0.5
    assert float(ratio[inside].min()) > 0.999 and float(ratio[inside].max()) < 1.02


def test_a_result_counts_only_inside_the_threat_model() -> None:
    victim, x, y, _, distances = linear_problem(2)
    radius = float(distances.median())
    result = CWL2(steps=250, rate=0.02)(victim, x, untargeted(y), ThreatModel("l2", radius))
    clear = away_from(distances, radius)
    assert torch.equal(result.success[clear], (distances < radius)[clear])
    assert bool((result.prediction != y).all())
    assert float(l2(result.x_adv, x).max()) > 1.5 * radius


def test_in_the_ledger_one_cell_gives_the_accuracy_at_every_radius(tmp_path: Path) -> None:
    victim = linear()
    data = images(victim)
    attack, ball = CWL2(steps=100, rounds=5), ThreatModel("l2", 0.2)
    cell = Ledger(tmp_path).run(victim, data, attack, ball, "adaptive", range(60))
    x, y = data.take(range(60))
    found = attack(victim, x, untargeted(y), ball, seed=0).x_adv  # nothing in it is drawn
    wrong = victim.decide(found) != y
    assert not bool(wrong.all())  # in so few steps not all are found
    distances = l2(found, x).masked_fill(~wrong, torch.inf).numpy()
    for radius in (0.05, 0.2, 0.4, 0.8):
        down = robustness.fallen(cell, ThreatModel("l2", radius))
        assert (
            down.tolist() == ((distances <= radius) | (cell.rows["clean_prediction"] != cell.rows["label"])).tolist()
        )
    assert 5 < int(cell.rows["success"].sum()) < 55  # of the cell's own radius
    assert cell.rows["success"].tolist() == robustness.fallen(cell, ball).tolist()
    assert robustness.figures(cell)["accuracy"] == robustness.rate(robustness.fallen(cell, ball))["accuracy"]
    corner = robustness.fallen(cell, ThreatModel("linf", 0.05))
    assert (
        corner.tolist()
        == (
            ((found - x).flatten(1).abs().amax(1) <= 0.05 + 1e-6).logical_and(wrong).numpy()
            | (cell.rows["clean_prediction"] != cell.rows["label"])
        ).tolist()
    )


class Stubborn(nn.Module):
    """Class 0 wherever you look, and a slope that promises otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        level = x.flatten(1).mean(1)
        return torch.stack([level + 5, level * 2], 1)


def test_where_nothing_is_found_the_image_comes_back() -> None:
    x = torch.rand(3, 1, 2, 2)
    result = CWL2(steps=30, rounds=4)(system(Stubborn(), (1, 2, 2), 2), x, untargeted(torch.zeros(3).long()), FAR)
    assert torch.equal(result.x_adv, x) and not bool(result.success.any())


def test_what_is_wrong_already_costs_one_look() -> None:
    victim, x, y, _, _ = linear_problem(2)
    result = CWL2(steps=50)(victim, x, untargeted(1 - y), FAR)
    assert bool(result.success.all()) and float(l2(result.x_adv, x).max()) < 1e-4
    assert result.cost.forwards.tolist() == [2] * len(x) and result.cost.backwards.sum() == 0


def test_the_binary_search_by_hand() -> None:
    weight = Weight.first(torch.zeros(3), 1.0)
    hits = torch.tensor([[False, False, True], [False, True, True], [True, False, False], [False, True, True]])
    values = []
    for hit in hits:
        weight.search(hit)
        values.append(weight.value.tolist())
    assert [v[0] for v in values] == [10.0, 100.0, 55.0, 77.5]  # hit at 100: between 10 and 100
    assert [v[1] for v in values] == [10.0, 5.5, 7.75, 6.625]
    assert [v[2] for v in values] == [0.5, 0.25, 0.375, 0.3125]


def test_leaving_a_round_early_costs_less_and_changes_little() -> None:
    x, y = digits()
    victim, some = system(trained_network(), (1, 8, 8), 10), slice(1500, 1532)
    short, full = (
        CWL2(steps=80, rounds=4, first_weight=0.1, rate=0.3, abort_early=early)(
            victim, x[some], untargeted(y[some]), FAR
        )
        for early in (True, False)
    )
    right = victim.decide(x[some]) == y[some]
    ratio = (l2(short.x_adv, x[some])[right].mean() / l2(full.x_adv, x[some])[right].mean()).item()
    assert 0.99 < ratio < 1.01
    assert full.cost.forwards[right].tolist() == [321] * int(right.sum())
    assert int(short.cost.forwards[right].sum()) < int(full.cost.forwards[right].sum())


def test_no_radius_holds_an_attack_that_it_beats() -> None:
    """On a trained network PGD at a radius finds nothing where C&W found a larger distance, but for a few."""
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    x, y = x[1500:1564], y[1500:1564]
    distances = l2(CWL2(steps=100, rounds=6, first_weight=0.1, rate=0.1)(victim, x, untargeted(y), FAR).x_adv, x)
    radius = float(distances.median())
    threat = ThreatModel("l2", radius)
    pgd = PGD(steps=100, restarts=2, objective="margin")(victim, x, untargeted(y), threat).success
    inside = distances <= radius
    assert int((pgd & ~inside).sum()) <= 3 and int((inside & ~pgd).sum()) <= 3


def test_cw_l2_counts_every_pass() -> None:
    x, y = digits()
    counter = Counter(trained_network())
    victim = system(counter, (1, 8, 8), 10)
    attack = CWL2(steps=20, rounds=3, first_weight=0.1)
    result = attack(victim, x[1500:1516], untargeted(y[1500:1516]), FAR)
    assert sum(counter.forwards) == int(result.cost.forwards.sum())  # the verification is in both
    assert sum(counter.gradients) == int(result.cost.backwards.sum())
    assert int(result.cost.queries.sum()) == 0
    bound = attack.passes(victim.views()["adaptive"], 16)
    assert (
        int(result.cost.forwards.sum()) - 16 <= bound[0] == 16 * 60 and int(result.cost.backwards.sum()) <= bound[1]
    )


def test_cw_l2_gives_an_image_the_same_among_others() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = CWL2(steps=30, rounds=3, first_weight=0.5)
    some = attack(victim, x[1500:1512], untargeted(y[1500:1512]), FAR)
    for i in (0, 5):
        alone = attack(victim, x[1500 + i : 1501 + i], untargeted(y[1500 + i : 1501 + i]), FAR)
        assert torch.allclose(alone.x_adv[0], some.x_adv[i], atol=1e-4)


# --- the Adam form in linf -----------------------------------------------------------------------------------


def test_cw_adam_succeeds_exactly_within_the_distance() -> None:
    victim, x, y, linf, _ = linear_problem(2)
    radius = float(linf.median())
    clear = away_from(linf, radius)
    for goal in (untargeted(y), targeted(y, 1 - y)):
        result = CWAdam(steps=200, rounds=2, rate=0.01)(victim, x, goal, ThreatModel("linf", radius))
        assert torch.equal(result.success[clear], (linf < radius)[clear])


def test_beyond_tau_distance_costs() -> None:
    """One pixel, z = (0, x - 0.8), from 0.5 in a ball of 0.4: loss max(d - .1, 0) + w max(.3 - d, 0) falls on only
    where w > 1, and with w < 1 rests at tau."""
    victim = linear_system(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -0.8]))
    x, goal = torch.full((1, 1, 1, 1), 0.5), untargeted(torch.tensor([0]))
    ball = ThreatModel("linf", 0.4)
    for weight, end in ((0.5, 0.1), (2.0, 0.3)):
        attack = CWAdam(steps=300, rate=0.005, first_weight=weight, tau=0.1, weighted=False, keep="last")
        moved = float(attack(victim, x, goal, ball).x_adv) - 0.5
        assert moved == pytest.approx(end, abs=0.02)
    searched = CWAdam(steps=300, rounds=2, rate=0.005, first_weight=0.5, tau=0.1)(victim, x, goal, ball)
    assert bool(searched.success)  # the second round weighs (0.5 + 128) / 2


def test_cw_adam_as_its_authors_run_it_is_weak_and_says_so() -> None:
    """It cannot even cross MNIST's ball: 100 steps of about 0.001. Run soundly, the same search leaves nothing."""
    x, y = digits()
    victim, x, goal = system(trained_network(), (1, 8, 8), 10), x[1500:1564], untargeted(y[1500:1564])
    ball = ThreatModel("linf", 0.3)
    legacy = CWAdam(steps=100, tau=8 / 255, weighted=False, keep="last", progress=1e-5)
    sound = CWAdam(steps=100, rounds=3, rate=0.01)
    assert bool(PGD(steps=20)(victim, x, goal, ball).success.all())
    assert float(sound(victim, x, goal, ball).success.float().mean()) > 0.95
    assert float(legacy(victim, x, goal, ball).success.float().mean()) < 0.6


def test_cw_adam_counts_every_pass() -> None:
    x, y = digits()
    x, y = x[1500:1516], y[1500:1516]
    for attack, queries in (
        (CWAdam(steps=10, rounds=3, rate=0.02), 3),
        (CWAdam(steps=10, rounds=3, keep="last"), 2),
        (CWAdam(steps=10, rounds=3, weighted=False, keep="last"), 0),
    ):
        counter = Counter(trained_network())
        victim = system(counter, (1, 8, 8), 10)
        result = attack(victim, x, untargeted(y), LINF)
        view = victim.views()["adaptive"]
        spent = result.cost.forwards.sum() + result.cost.queries.sum()
        assert sum(counter.forwards) == int(spent) and sum(counter.gradients) == int(result.cost.backwards.sum())
        rounds = 1 if not attack.weighted else 3
        assert attack.passes(view, 16) == (16 * 10 * rounds, 16 * 10 * rounds, 16 * queries)
        assert int(result.cost.queries.max()) <= queries and int(result.cost.forwards.max()) - 1 <= 10 * rounds


def test_on_a_view_that_is_not_exact_the_highest_margin_is_kept() -> None:
    class Behind(type(system(nn.Flatten(), (1, 1, 2), 2))):  # type: ignore[misc]
        def views(self) -> dict[str, View]:
            return {n: View(n, v.logits, False, v.offers) for n, v in super().views().items()}

    victim, x, y, _, _ = linear_problem(2)
    behind = Behind(victim.classifier, input_shape=(1, 1, 12), num_classes=2)
    goal: Goal = untargeted(y)
    result = CWAdam(steps=100, rounds=2, rate=0.01, kappa=99.0)(behind, x, goal, LINF)
    weight = victim.classifier[1].weight.detach()
    best = x.flatten(1) + 0.1 * (weight[1 - y] - weight[y]).sign()
    assert torch.allclose(result.x_adv.flatten(1), best.clamp(0, 1), atol=0.01)


def test_mistakes_are_said_in_one_line() -> None:
    with pytest.raises(UserError, match="first_weight must not be above highest_weight"):
        CWAdam(first_weight=200.0)
    victim, x, y, _, _ = linear_problem(2)
    with pytest.raises(UserError, match="CWAdam works in linf, not in l2"):
        CWAdam()(victim, x, untargeted(y), FAR)
