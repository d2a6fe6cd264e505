"""EOT over rotations and the rotation-translation grid, against turns that can be worked out by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, linear_system, system, trained_network
from torch import Tensor

from casemate.attacks.ascent import l2_step
from casemate.attacks.gradient import PGD
from casemate.attacks.rotation import EOTRotation, RotationTranslation, wrong_when_turned
from casemate.attacks.warping import RotationBudget, rotate
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.system import TorchSystem, View
from casemate.threat import Goal, ThreatModel, targeted, untargeted

LINF = ThreatModel("linf", 0.1)


def right_digits(n: int) -> tuple[Tensor, Tensor]:
    x, y = (part[1500:] for part in digits())
    right = trained_network()(x).argmax(1) == y
    return x[right][:n], y[right][:n]


def victim() -> TorchSystem:
    return system(trained_network(), (1, 8, 8), 10)


def turned(x: Tensor, degrees: float, right: float = 0.0, down: float = 0.0) -> Tensor:
    return rotate(x, torch.full((len(x),), degrees), torch.tensor([[right, down]]).expand(len(x), 2))


# --- turning ------------------------------------------------------------------------------------------------------


def test_quarter_turns_are_exact_and_counter_clockwise() -> None:
    x = torch.rand(3, 2, 8, 8)
    for quarter in (-1, 0, 1, 2):
        assert torch.allclose(turned(x, 90.0 * quarter), torch.rot90(x, quarter, (2, 3)), atol=1e-5)


def test_shifts_move_right_and_down_and_black_comes_in() -> None:
    x = torch.rand(2, 1, 5, 7)
    moved = turned(x, 0.0, 2, 1)
    assert torch.allclose(moved[:, :, 1:, 2:], x[:, :, :-1, :-2], atol=1e-6)
    assert moved[:, :, 0].abs().max() < 1e-6 and moved[:, :, :, :2].abs().max() < 1e-6


def test_each_image_turns_by_its_own_angle_and_corners_go_black() -> None:
    x = torch.ones(2, 1, 9, 9)
    out = rotate(x, torch.tensor([0.0, 45.0]))
    assert torch.allclose(out[0], x[0], atol=1e-6)
    assert out[1, 0, 0, 0] == 0 and out[1, 0, 4, 4] == pytest.approx(1)
    assert turned(torch.rand(1, 3, 6, 1), 30.0).shape == (1, 3, 6, 1)


def test_the_rotation_budget_catches_what_is_no_such_turn() -> None:
    x, budget = digits()[0][:7], RotationBudget(30, 1)
    moved = torch.tensor([[20, 0.5, -1], [30, 0, 0], [0, 0, 0], [20, 0, 0], [31, 0, 0], [0, 1.1, 0], [5, 0, 0]])
    made = rotate(x, moved[:, 0], moved[:, 1:])
    assert budget.contains(made, x, moved).tolist() == [True, True, True, True, False, False, True]
    made[0, 0, 2, 2] += 0.01
    made[6, 0, 0, 0] = torch.nan
    other = moved.clone()
    other[3, 0] = 21.0
    assert budget.contains(made, x, other).tolist() == [False, True, True, False, False, False, False]
    assert str(budget) == "rotation 30 deg, shift 1 px" and str(RotationBudget(45, 0)) == "rotation 45 deg"


# --- EOT ----------------------------------------------------------------------------------------------------------


def centred() -> tuple[TorchSystem, Tensor, Goal, Tensor]:
    """The centre pixel of 5 x 5 decides, which no rotation moves: so EOT is plain ascent. Returns the distances."""
    weight = torch.zeros(2, 25)
    weight[1, 12] = 1
    made = linear_system(weight, torch.tensor([0.6, 0.0]), (1, 5, 5))
    x = torch.full((7, 1, 5, 5), 0.3)
    x[:, 0, 2, 2] = torch.linspace(0.45, 0.595, 7)
    return made, x, untargeted(torch.zeros(7, dtype=torch.long)), 0.6 - x[:, 0, 2, 2]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_where_rotations_change_nothing_eot_succeeds_exactly_within_the_distance(norm: Any, keep: Any) -> None:
    made, x, goal, distance = centred()
    result = EOTRotation(steps=20, rotations=3, keep=keep)(made, x, goal, ThreatModel(norm, 0.08))
    assert torch.equal(result.success, distance < 0.08) and 0 < int(result.success.sum()) < 7


def test_a_step_climbs_the_mean_over_the_angles() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    made = linear_system(weight, shape=(1, 8, 8))
    x, threat = torch.full((4, 1, 8, 8), 0.5), ThreatModel("l2", 0.1)
    y = made.decide(x)
    result = EOTRotation(steps=1, rotations=6, angle=40, step_size=0.05, keep="last")(
        made, x, untargeted(y), threat, 5
    )
    turns = (2 * torch.rand(6, 4, generator=generator(5, "angles", 0)) - 1) * 40
    leaf = x.clone().requires_grad_()
    copies = torch.stack([made.logits(rotate(leaf, turn)).log_softmax(1) for turn in turns])
    loss = -copies.mean(0).gather(1, y[:, None]).sum()
    expected = l2_step(torch.autograd.grad(loss, leaf)[0])
    assert torch.allclose(result.x_adv - x, 0.05 * expected, atol=1e-6)


def test_eot_has_a_higher_loss_over_the_angles_than_an_attack_on_the_upright_image() -> None:
    x, y = right_digits(60)
    goal = untargeted(y)
    eot = EOTRotation(steps=20, keep="last")(victim(), x, goal, LINF)
    pgd = PGD(steps=20, keep="last")(victim(), x, goal, LINF)

    def loss(images: Tensor) -> float:
        angles = torch.linspace(-45, 45, 15).tolist()
        with torch.no_grad():
            values = [cross_entropy(victim().logits(turned(images, a)), goal) for a in angles]
        return float(torch.stack(values).mean())

    assert loss(eot.x_adv) > 1.1 * loss(pgd.x_adv) > 1.1 * loss(x)
    wrong = [wrong_when_turned(victim(), r, goal, angles=15).mean() for r in (eot.x_adv, x)]
    assert wrong[0] > wrong[1] > 0 and LINF.contains(eot.x_adv, x).all()


def test_wrong_when_turned_is_a_share_of_the_angles() -> None:
    made, x, goal, _ = centred()
    assert not wrong_when_turned(made, x, goal).any()
    x[3, 0, 2, 2] = 0.9
    assert wrong_when_turned(made, x, goal, angles=4).tolist() == [0, 0, 0, 1, 0, 0, 0]
    weight = torch.zeros(2, 9)
    weight[1, 5] = 1  # right of the centre: bright there after a quarter turn clockwise only
    corner = linear_system(weight, torch.tensor([0.5, 0.0]), (1, 3, 3))
    one = torch.zeros(1, 1, 3, 3)
    one[0, 0, 0, 1] = 1
    assert wrong_when_turned(corner, one, untargeted(torch.tensor([0])), angle=90, angles=3).item() == pytest.approx(
        1 / 3
    )


def standing(n: int = 8) -> tuple[TorchSystem, Counter, Tensor, Goal]:
    x, y = right_digits(n)
    counter = Counter(trained_network())
    return system(counter, (1, 8, 8), 10), counter, x, untargeted(y)


def test_eot_costs_a_pass_per_copy_and_a_look_per_step() -> None:
    made, counter, x, goal = standing()
    tiny = ThreatModel("linf", 1e-5)
    for keep, looks in (("best", 3), ("last", 0)):
        counter.forwards.clear()
        counter.gradients.clear()
        attack = EOTRotation(steps=3, rotations=4, keep=keep)  # type: ignore[arg-type]
        result = attack(made, x, goal, tiny)
        assert counter.forwards == [8] * (12 + looks + 1) and counter.gradients == [8] * 12
        assert result.cost.forwards.tolist() == [13] * 8 and result.cost.backwards.tolist() == [12] * 8
        assert result.cost.queries.tolist() == [looks] * 8
        assert attack.passes(made.views()["adaptive"], 8) == (96, 96, 8 * looks)


def test_fallen_images_leave_and_the_others_do_not_notice() -> None:
    x, y = right_digits(20)
    counter = Counter(trained_network())
    attack = EOTRotation(steps=10, rotations=3)
    alone = attack(victim(), x, untargeted(y), LINF, 2)
    labels = torch.where(torch.arange(20) % 2 == 0, (y + 1) % 10, y)
    among = attack(system(counter, (1, 8, 8), 10), x, untargeted(labels), LINF, 2)
    assert torch.allclose(alone.x_adv[1::2], among.x_adv[1::2], atol=1e-6)
    assert torch.equal(among.x_adv[::2], x[::2]) and among.cost.forwards[::2].tolist() == [1] * 10
    assert counter.forwards[:2] == [20, 10]
    assert sum(counter.forwards) == int(among.cost.forwards.sum() + among.cost.queries.sum())
    assert not torch.equal(attack(victim(), x, untargeted(y), LINF, 3).x_adv, alone.x_adv)


class Inexact(TorchSystem):
    def views(self) -> dict[str, View]:
        return {name: View(name, self.classifier, False, self.offers) for name in ("static", "adaptive")}


def test_on_a_view_that_is_not_exact_the_highest_objective_is_kept() -> None:
    x, y = right_digits(12)
    counter = Counter(trained_network())
    blind = Inexact(counter, input_shape=(1, 8, 8), num_classes=10)
    attack = EOTRotation(steps=4, rotations=2, objective="margin")
    result = attack(blind, x, untargeted(y), LINF)
    assert counter.forwards == [12] * (4 * 3 + 1 + 1) and result.cost.queries.tolist() == [5] * 12
    assert attack.passes(blind.views()["static"], 12) == (96, 96, 60)
    assert result.success.any()


def test_eot_towards_a_target() -> None:
    x, y = right_digits(20)
    result = EOTRotation(steps=15, rotations=3)(victim(), x, targeted(y, (y + 1) % 10), ThreatModel("linf", 0.3))
    assert result.success.float().mean() > 0.5
    assert torch.equal(result.prediction[result.success], ((y + 1) % 10)[result.success])


# --- the grid -----------------------------------------------------------------------------------------------------


def test_the_grid_is_that_of_foolbox_smallest_first() -> None:
    motions = RotationTranslation().motions()
    turns, moves = (-30.0, -15.0, 0.0, 15.0, 30.0), (-3.0, -1.5, 0.0, 1.5, 3.0)
    assert set(motions) == set(product(turns, moves, moves)) and len(motions) == 125
    assert motions[0] == (0, 0, 0) and set(motions[-8:]) == set(product((-30, 30), (-3, 3), (-3, 3)))
    assert RotationTranslation(angles=1, shifts=1).motions() == [(0, 0, 0)]
    assert RotationTranslation(shift=0, angles=3).motions() == [(0, 0, 0), (-30, 0, 0), (30, 0, 0)]


def test_an_image_falls_to_the_first_motion_that_fools_the_system() -> None:
    x, y = right_digits(40)
    attack = RotationTranslation(angle=12, shift=0.4, angles=3, shifts=3)
    counter = Counter(trained_network())
    result = attack(system(counter, (1, 8, 8), 10), x, untargeted(y), LINF)
    wrong = torch.stack([victim().decide(turned(x, *motion)) != y for motion in attack.motions()])
    assert torch.equal(result.success, wrong.any(0)) and 10 < int(result.success.sum()) < 40
    first = wrong.float().argmax(0)
    fell = result.success
    assert result.witness is not None
    assert torch.equal(result.witness[fell], torch.tensor(attack.motions())[first[fell]])
    assert torch.equal(result.x_adv[~fell], x[~fell]) and not result.witness[~fell].any()
    assert torch.equal(result.cost.queries[fell], first[fell] + 1) and (result.cost.queries[~fell] == 27).all()
    assert sum(counter.forwards) == int(result.cost.queries.sum()) + 40
    assert attack.passes(victim().views()["adaptive"], 40) == (0, 0, 40 * 27)


def test_clean_errors_fall_to_no_motion_at_all_and_flat_images_to_none() -> None:
    x, y = right_digits(4)
    result = RotationTranslation(angles=3, shifts=1)(victim(), x, untargeted((y + 1) % 10), LINF)
    assert torch.equal(result.x_adv, x) and result.cost.queries.tolist() == [1] * 4
    black = torch.zeros(1, 1, 8, 8)
    still = RotationTranslation(angles=3, shifts=3)(victim(), black, untargeted(victim().decide(black)), LINF)
    assert not still.success.any() and torch.equal(still.x_adv, black)
    alone = EOTRotation(steps=2, rotations=2)(victim(), black, untargeted(victim().decide(black)), LINF)
    assert alone.x_adv.isfinite().all()
