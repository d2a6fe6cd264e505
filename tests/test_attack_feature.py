"""FeaAttack against steps worked out by hand, and where flattened logits stop a loss on them."""

from __future__ import annotations

import functools

import pytest
import torch
from attack_toys import digits, fresh_network, system, trained_network
from torch import Tensor, nn

from casemate.attacks.feature import Feature
from casemate.attacks.gradient import PGD
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.seeding import generator
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel, targeted, untargeted

LINF = ThreatModel("linf", 0.1)


def pixels_as_features(weight: Tensor) -> TorchSystem:
    """phi(x) = x, z = W x."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        head.weight.copy_(weight)
    shape = (1, 1, weight.shape[1])
    network = Classifier(input_shape=shape, num_classes=len(weight), layers={"flat": nn.Flatten()}, head=head)
    return system(network.eval(), shape, len(weight))


@functools.cache
def some_digits() -> tuple[TorchSystem, Tensor, Tensor]:
    x, y = digits()
    return system(trained_network(), (1, 8, 8), 10), x[1500:1540], y[1500:1540]


def test_one_step_goes_down_the_angle_to_the_target() -> None:
    """d(1 - cos(x, t)) / dx = cos x / |x|^2 - t / (|x| |t|); two images, so each has one possible target."""
    victim = pixels_as_features(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    x = torch.tensor([[0.9, 0.3, 0.4, 0.5], [0.2, 0.8, 0.7, 0.3]]).view(2, 1, 1, 4)
    y, threat = torch.tensor([0, 1]), ThreatModel("linf", 0.05)
    result = Feature(targets=1, steps=1, relative_step=0.5)(victim, x, untargeted(y), threat, seed=3)
    start = threat.random_start(x, generator(3, "feature start", 0)).flatten(1)
    other = x.flatten(1).flip(0)
    cos = torch.cosine_similarity(start, other)[:, None]
    lengths = start.norm(dim=1, keepdim=True), other.norm(dim=1, keepdim=True)
    slope = cos * start / lengths[0] ** 2 - other / (lengths[0] * lengths[1])
    expected = threat.project((start - 0.025 * slope.sign()).view_as(x), x)
    assert not bool(result.success.any()) and torch.allclose(result.x_adv, expected, atol=1e-6)


def test_it_reaches_the_features_it_is_sent_to() -> None:
    """In a ball that holds the target the cosine tends to 1, and its class with it."""
    victim = pixels_as_features(torch.eye(3))
    x = (0.4 + 0.2 * torch.eye(3)).view(3, 1, 1, 3)
    y = torch.arange(3)
    goal = targeted(y, (y + 1) % 3)
    result = Feature(targets=3, steps=60, relative_step=0.05)(victim, x, goal, ThreatModel("linf", 0.3))
    assert bool(result.success.all())
    free = Feature(targets=3, steps=60, step_size=0.01)(victim, x, untargeted(y), ThreatModel("linf", 0.3))
    assert bool(free.success.all())
    l2 = Feature(targets=3, steps=60, step_size=0.01)(victim, x, untargeted(y), ThreatModel("l2", 0.3))
    assert bool(l2.success.all())


def test_targets_are_of_other_classes_or_of_the_one_wanted() -> None:
    y = torch.tensor([0, 0, 1, 2, 2, 2])
    attack = Feature(targets=400)
    drawn = attack._drawn(untargeted(y), seed=1)
    assert drawn.shape == (6, 400)
    for i in range(6):
        assert set(drawn[i].tolist()) == {j for j in range(6) if y[j] != y[i]}
    wanted = targeted(y, (y + 1) % 3)
    assert bool((y[attack._drawn(wanted, seed=1)] == ((y + 1) % 3)[:, None]).all())


class Loud(nn.Module):
    """A head whose logits are so far apart that the loss on them has no slope in float32."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = 1e4 * self.head(features)
        return out


def test_where_the_loss_on_logits_has_no_slope_features_still_have_one() -> None:
    _, x, y = some_digits()
    network = fresh_network()
    network.load_state_dict(trained_network().state_dict())
    network.head = Loud(network.head)
    victim = system(network, (1, 8, 8), 10)
    right = victim.decide(x) == y
    stuck = PGD(steps=20, random_start=False)(victim, x, untargeted(y), LINF).success[right]
    found = Feature(targets=6, steps=15, step_size=0.02)(victim, x, untargeted(y), LINF).success[right]
    assert int(stuck.sum()) <= 0.1 * len(stuck) and int(found.sum()) >= 0.25 * len(found)


def test_it_counts_every_pass_and_fallen_images_leave() -> None:
    _, x, y = some_digits()
    network = fresh_network()
    network.load_state_dict(trained_network().state_dict())
    forwards: list[int] = []
    gradients: list[int] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        forwards.append(len(given[0]))
        if given[0].requires_grad:
            given[0].register_hook(lambda g: gradients.append(len(g)))

    network.register_forward_pre_hook(look)
    victim = system(network, (1, 8, 8), 10)
    attack = Feature(targets=5, steps=6)
    result = attack(victim, x, untargeted(y), LINF)
    spent = int(result.cost.forwards.sum() + result.cost.queries.sum())
    assert sum(forwards) == spent and sum(gradients) == int(result.cost.backwards.sum())
    bound = attack.passes(victim.views()["adaptive"], 40)
    assert bound == (40 * 30, 40 * 30, 40 * 6)
    standing = ~result.success
    assert result.cost.forwards[standing].tolist() == [31] * int(standing.sum())
    assert result.cost.queries[standing].tolist() == [6] * int(standing.sum())
    assert int(result.cost.forwards[result.success].sum()) < 31 * int(result.success.sum())
    assert not network.head._forward_pre_hooks


def test_without_a_sight_of_success_the_highest_margin_is_kept() -> None:
    class Behind(TorchSystem):
        def views(self) -> dict[str, View]:
            shown = super().views()
            return {n: View(n, v.logits, False, v.offers, system=self) for n, v in shown.items()}

    seen, x, y = some_digits()
    behind = Behind(seen.classifier, input_shape=(1, 8, 8), num_classes=10)
    attack = Feature(targets=3, steps=8, step_size=0.02)
    open_, hidden = attack(seen, x, untargeted(y), LINF), attack(behind, x, untargeted(y), LINF)
    assert torch.equal(hidden.success, open_.success)  # the best margin of all iterates is a success if any is
    assert hidden.cost.forwards.tolist() == [25] * 40 and hidden.cost.queries.tolist() == [4] * 40


def test_mistakes_are_said_in_one_line() -> None:
    victim, x, y = some_digits()
    same = y == y[0]
    with pytest.raises(UserError, match="towards images of another class, and the batch holds none"):
        Feature()(victim, x[same], untargeted(y[same]), LINF)
    with pytest.raises(UserError, match="towards images of the target class, and the batch holds none"):
        Feature()(victim, x[same], targeted(y[same], (y[same] + 1) % 10), LINF)
    bare = system(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (1, 8, 8), 10)
    with pytest.raises(UserError, match="needs the features of the classifier, and this system shows none"):
        Feature()(bare, x, untargeted(y), LINF)
