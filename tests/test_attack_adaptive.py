"""White-box attacks through a purification: the adaptive view is identity-backward BPDA, and it is not optional."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attack_toys import Counter, digits, fresh_network, system, trained_network
from torch import Tensor, nn

from casemate.attacks.adaptive import AllIterates, NoiseAveraged, PreCompensation
from casemate.attacks.diagnostics import zero_gradient_share, zero_gradients
from casemate.attacks.gradient import FGSM, PGD, CWMargin
from casemate.errors import UserError
from casemate.evaluation.plan import not_evaluated
from casemate.objectives import cross_entropy
from casemate.purification.imt import IMT
from casemate.seeding import generator
from casemate.system import Purification, TorchSystem, View, identity_backward, noise_averaged
from casemate.threat import Goal, ThreatModel, untargeted


class Critic(nn.Module):
    """A ReLU critic of logits: its slope, and so the direction IMT moves in, is piecewise constant."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(codes)[:, 0], codes


def imt_system(classifier: nn.Module, radius: float = 0.05) -> TorchSystem:
    torch.manual_seed(1)
    critic: Any = Critic().to(next(classifier.parameters()).dtype)
    imt = IMT(classifier, critic, radius=radius)  # type: ignore[arg-type]
    return TorchSystem(classifier, input_shape=(1, 8, 8), num_classes=10, purification=imt, name="imt")


def test_the_bpda_gradient_is_that_of_the_whole_pipeline() -> None:
    """Central differences of the deployed loss, in directions that do not change the purification's sign pattern."""
    victim = imt_system(fresh_network().double())
    x = 0.2 + 0.6 * torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    goal = untargeted(torch.arange(8))
    moved = victim.purification(x) - x  # type: ignore[misc]
    assert torch.allclose(moved.abs(), torch.tensor(0.05, dtype=torch.double))  # unclipped, and no dead pixel
    view = victim.views()["adaptive"]
    with victim.frozen():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(view.logits(leaf), goal).sum(), leaf)
        for seed in range(5):
            way = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
            ends = [cross_entropy(victim.logits(x + s * way), goal) for s in (1, -1)]
            expected = (gradient * way).flatten(1).sum(1)
            assert torch.allclose((ends[0] - ends[1]) / 2, expected, rtol=1e-4, atol=1e-13)
        static = victim.views()["static"]
        (other,) = torch.autograd.grad(cross_entropy(static.logits(leaf), goal).sum(), leaf)
    assert not torch.allclose(gradient, other, rtol=0.01)


def test_the_adaptive_view_gives_the_deployed_logits_bit_for_bit() -> None:
    victim, (x, _) = imt_system(trained_network()), digits()
    assert torch.equal(victim.views()["adaptive"].logits(x), victim.logits(x))


class Shift(Purification):
    """Moves every image down by 0.1."""

    passes = (0, 0)
    modules: Sequence[nn.Module] = ()
    spec: dict[str, Any] = {"purification": "shift"}  # noqa: RUF012

    def __call__(self, x: Tensor) -> Tensor:
        return (x - 0.1).clamp(0, 1)

    def score(self, x: Tensor) -> Tensor:
        return torch.ones(len(x))

    def views(self, classifier: Any) -> dict[str, View]:
        return {"adaptive": identity_backward(classifier, self)}


class Island(nn.Module):
    """One pixel; class 1 in (0.5, 0.6) only, and its margin peaks in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([torch.zeros_like(x), 0.05 - (x - 0.55).abs()], dim=1)


def island() -> TorchSystem:
    """Behind the shift, class 1 is where the attacked pixel is in (0.6, 0.7)."""
    return TorchSystem(Island(), input_shape=(1, 1, 1), num_classes=2, purification=Shift())


def test_static_attacks_leave_standing_what_adaptive_ones_do_not() -> None:
    """The static attack climbs to 0.55, which the shift makes 0.45: class 0. The adaptive one goes on to 0.65."""
    victim = island()
    x = torch.linspace(0.4, 0.48, 9).view(9, 1, 1, 1)
    goal, threat = untargeted(torch.zeros(9, dtype=torch.long)), ThreatModel("linf", 0.3)
    for attack in (PGD(relative_step=0.1), CWMargin(relative_step=0.1)):
        static = attack(victim, x, goal, threat, view="static")
        adaptive = attack(victim, x, goal, threat)
        assert not static.success.any() and adaptive.success.all()
        assert torch.allclose(static.x_adv, torch.tensor(0.55), atol=0.016)
        assert torch.allclose(adaptive.x_adv, torch.tensor(0.65), atol=0.05)


def test_passes_through_a_purification_are_counted_in_passes_of_the_classifier() -> None:
    x, y = digits()
    counter = copy.deepcopy(trained_network())
    seen = Counter(counter.head)
    counter.head = seen
    victim, goal = imt_system(counter, radius=0.001), untargeted(y[:20])
    right = victim.decide(x[:20]) == y[:20]
    x, goal = x[:20][right], goal[right]
    n = len(x)

    seen.forwards.clear()
    attack = PGD(steps=3)
    adaptive = attack(victim, x, goal, ThreatModel("linf", 0.001))
    # A step: IMT's forward and backward, then the classifier's; the verification: IMT's pair and a forward.
    assert seen.forwards == [n] * 8
    assert adaptive.cost.forwards.tolist() == [8] * n and adaptive.cost.backwards.tolist() == [7] * n
    assert attack.passes(victim.views()["adaptive"], n) == (6 * n, 6 * n, 0)

    seen.forwards.clear()
    static = attack(victim, x, goal, ThreatModel("linf", 0.001), view="static")
    assert seen.forwards == [n] * 3 + [n] + [n] * 2  # steps, the query for the last iterate, the verification
    assert static.cost.forwards.tolist() == [5] * n and static.cost.backwards.tolist() == [4] * n
    assert static.cost.queries.tolist() == [1] * n


def test_a_system_without_purification_looks_the_same_from_everywhere() -> None:
    x, y = digits()
    victim = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    results = [
        PGD(steps=3)(victim, x[:20], untargeted(y[:20]), ThreatModel("linf", 0.1), view=v).x_adv
        for v in ("static", "adaptive")
    ]
    assert torch.equal(*results)


def test_images_without_a_slope_are_counted() -> None:
    class Dead(nn.Module):
        """The slope vanishes where the first pixel is below one half."""

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return torch.stack([x[:, 0] * 0, (x[:, 0] - 0.5).clamp(min=0) * x[:, 1]], dim=1)

    x = torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.9, 0.5], [0.4, 0.1, 0.5], [0.1, 0.6, 0.5]]).view(4, 1, 1, 3)
    victim = TorchSystem(Dead(), input_shape=(1, 1, 3), num_classes=2)  # the third pixel never matters
    goal, view = untargeted(torch.zeros(4, dtype=torch.long)), victim.views()["adaptive"]
    with torch.no_grad():
        assert zero_gradients(view, x, goal).tolist() == [True, False, True, True]
        assert zero_gradient_share(view, x, goal) == 0.75
    assert not x.requires_grad
    assert torch.equal(FGSM()(victim, x[:1], goal[torch.tensor([0])], ThreatModel("linf", 0.1)).x_adv, x[:1])


# --- procedures ---------------------------------------------------------------------------------------------------


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def zeros(n: int) -> Goal:
    return untargeted(torch.zeros(n, dtype=torch.long))


def test_any_iterate_of_the_static_attack_may_be_the_one_that_fools_the_system() -> None:
    """From 0.75 the classifier's loss leads down to 0.55, past the island at (0.6, 0.7) that the shift makes."""
    threat, how = ThreatModel("linf", 0.3), {"steps": 12, "relative_step": 0.02 / 0.3, "random_start": False}
    static = PGD(**how)(island(), pixels(0.75), zeros(1), threat, view="static")
    assert not static.success.any() and float(static.x_adv) == pytest.approx(0.55, abs=0.02)
    every = AllIterates(**how, restarts=1)(island(), pixels(0.75, 0.2), zeros(2), threat)
    assert every.success.tolist() == [True, False]
    assert every.x_adv.flatten().tolist() == pytest.approx([0.69, 0.44], abs=1e-6)
    # Each forward is one of the classifier alone, and goes with one question; one verification is added.
    assert every.cost.forwards.tolist() == [4 + 1, 12 + 1] and every.cost.queries.tolist() == [4, 12]
    assert every.cost.backwards.tolist() == [4, 12]  # the image that fell leaves after the gradient was taken


def test_all_iterates_and_their_questions_are_counted_over_restarts() -> None:
    """An image that never falls: the last iterate of every restart but the last is looked at, too."""
    attack = AllIterates(steps=5, restarts=3)
    victim = island()
    result = attack(victim, pixels(0.1), zeros(1), ThreatModel("linf", 0.05))
    assert result.cost.forwards.tolist() == [15 + 1] and result.cost.backwards.tolist() == [15]
    assert result.cost.queries.tolist() == [15 + 2 + 2]
    assert attack.passes(victim.views()["adaptive"], 1) == (15, 15, 19)


def test_pre_compensation_finds_what_the_purification_moves_onto_the_target() -> None:
    """The target is 0.55, the classifier's peak; 0.65 is moved onto it. From 0.25 that is out of reach."""
    attack = PreCompensation(steps=20, relative_step=0.05, random_start=False)
    victim = island()
    result = attack(victim, pixels(0.48, 0.25), zeros(2), ThreatModel("linf", 0.3))
    assert result.success.tolist() == [True, False]
    assert float(result.x_adv[0]) == pytest.approx(0.65, abs=0.011)
    assert float(result.x_adv[1]) <= 0.55 + 1e-6
    # 20 steps and a look at the last iterate; then the target itself, and as many pre-images as it took.
    assert result.cost.forwards.tolist() == [21, 21] and result.cost.queries.tolist() == [1 + 2, 1 + 11]
    assert attack.passes(victim.views()["adaptive"], 2) == (40, 40, 24)


def test_each_restart_of_pre_compensation_has_its_own_target() -> None:
    """Class 1 on two islands; the shift takes one of them out of the budget."""

    class Islands(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return torch.cat([torch.zeros_like(x), 0.04 - torch.minimum((x - 0.3).abs(), (x - 0.7).abs())], dim=1)

    victim = TorchSystem(Islands(), input_shape=(1, 1, 1), num_classes=2, purification=Shift())
    x, threat = pixels(*[0.5] * 40), ThreatModel("linf", 0.25)  # 0.4 is moved onto 0.3, and 0.8 is out of reach
    fallen = [
        int(PreCompensation(steps=20, restarts=n)(victim, x, zeros(40), threat, seed=1).success.sum()) for n in (1, 6)
    ]
    assert 5 < fallen[0] < 35 and fallen[1] > fallen[0]


def test_the_averaged_face_answers_like_the_other_and_its_slope_is_the_mean_over_the_neighbourhood() -> None:
    class Kink(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return torch.cat([torch.zeros_like(x), (x - 0.5).abs()], dim=1)

    view = system(Kink(), (1, 1, 1), 2).views()["adaptive"]
    x = pixels(0.501, 0.9)
    averaged = noise_averaged(view, 9, 0.05)
    noise = torch.cat(
        [torch.zeros(1)] + [torch.randn(1, generator=generator(0, "noise averaged", n)) for n in range(1, 9)]
    )
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(averaged.logits(leaf)[:, 1].sum(), leaf)
    expected = [float((v + 0.05 * noise - 0.5).sign().mean()) for v in (0.501, 0.9)]
    assert -1 < expected[0] < 1 and expected[1] == 1
    assert gradient.flatten().tolist() == pytest.approx(expected)
    assert torch.equal(averaged.logits(leaf), view.logits(x))
    assert averaged.passes == (9, 9) and averaged.exact


def test_noise_averaged_ascent_costs_its_draws() -> None:
    x, y = digits()
    victim = imt_system(trained_network(), radius=0.001)
    right = victim.decide(x[:20]) == y[:20]
    x, goal = x[:20][right], untargeted(y[:20][right])
    attack = NoiseAveraged(draws=3, steps=4)
    result = attack(victim, x, goal, ThreatModel("linf", 0.001))
    n = len(x)
    assert result.cost.forwards.tolist() == [3 * 2 * 4 + 2] * n and result.cost.backwards.tolist() == [24 + 1] * n
    assert attack.passes(victim.views()["adaptive"], n) == (24 * n, 24 * n, 0)
    assert not result.success.any()


@pytest.mark.parametrize("attack", [AllIterates(), PreCompensation(), NoiseAveraged()])
def test_attacks_on_a_purification_are_refused_without_one(attack: Any) -> None:
    victim, x = system(Island(), (1, 1, 1), 2), pixels(0.5)
    with pytest.raises(UserError, match="needs purification, and classifier offers only"):
        attack(victim, x, zeros(1), ThreatModel("linf", 0.1))


def test_a_purification_without_attacks_of_its_own_shows_no_adaptive_face() -> None:
    class Bare(Shift):
        def views(self, classifier: Any) -> dict[str, View]:
            return Purification.views(self, classifier)

    victim = TorchSystem(Island(), input_shape=(1, 1, 1), num_classes=2, purification=Bare())
    assert set(victim.views()) == {"static"} and victim.adaptive_attacks() == {}
    assert "not evaluated" in str(not_evaluated(victim))
    assert not_evaluated(island()) is None
