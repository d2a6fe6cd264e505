"""White-box attacks through a purification: the adaptive view is identity-backward BPDA, and it is not optional."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from attack_toys import Counter, digits, fresh_network, trained_network
from torch import Tensor, nn

from casemate.attacks.diagnostics import zero_gradient_share, zero_gradients
from casemate.attacks.gradient import FGSM, PGD, CWMargin
from casemate.objectives import cross_entropy
from casemate.purification.imt import IMT
from casemate.system import TorchSystem
from casemate.threat import ThreatModel, untargeted


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


class Shift:
    """Moves every image down by 0.1."""

    passes = (0, 0)
    modules: Sequence[nn.Module] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return (x - 0.1).clamp(0, 1)

    def score(self, x: Tensor) -> Tensor:
        return torch.ones(len(x))

    @property
    def spec(self) -> dict[str, Any]:
        return {"purification": "shift"}


class Island(nn.Module):
    """One pixel; class 1 in (0.5, 0.6) only, and its margin peaks in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.cat([torch.zeros_like(x), 0.05 - (x - 0.55).abs()], dim=1)


def test_static_attacks_leave_standing_what_adaptive_ones_do_not() -> None:
    """The static attack climbs to 0.55, which the shift makes 0.45: class 0. The adaptive one goes on to 0.65."""
    victim = TorchSystem(Island(), input_shape=(1, 1, 1), num_classes=2, purification=Shift())  # type: ignore[arg-type]
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
