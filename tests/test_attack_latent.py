"""The latent attack against steps worked out by hand and a plain loop, its ranges, and what it counts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_toys import digits, fresh_network, linear_system, system, trained_network
from row_toys import Shift
from torch import Tensor, nn

from casemate.attacks.latent import Latent
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.randomised import GaussianNoise, RandomisedSystem
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel, targeted, untargeted

LINF = ThreatModel("linf", 0.1)


def pixels_as_codes(weight: list[list[float]]) -> TorchSystem:
    """h(x) = x, g(z) = W z."""
    head = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(weight))
    shape = (1, 1, len(weight[0]))
    network = Classifier(input_shape=shape, num_classes=len(weight), layers={"flat": nn.Flatten()}, head=head)
    return system(network.eval(), shape, len(weight))


@functools.cache
def some_digits() -> tuple[TorchSystem, Tensor, Tensor]:
    x, y = digits()
    return system(trained_network(), (1, 8, 8), 10), x[1500:1540], y[1500:1540]


class Behind(TorchSystem):
    """The same system, its views not exact."""

    def views(self) -> dict[str, View]:
        shown = super().views()
        return {n: View(n, v.logits, False, v.offers, system=self) for n, v in shown.items()}


# --- by hand ------------------------------------------------------------------------------------------------


def test_a_round_of_one_step_each() -> None:
    """The codes go where class 1 gains, within [0.3, 1.1 x 0.8]; pixels follow the sign of the way that is left."""
    victim = pixels_as_codes([[0.0, 0.0, 0.0, 0.0], [-1.0, 0.2, -1.0, 0.2]])
    x, y = torch.tensor([0.3, 0.8, 0.7, 0.5]).view(1, 1, 1, 4), torch.tensor([0])
    attack = Latent(rounds=1, latent_steps=1, steps=1, relative_step=0.2)
    result = attack(victim, x, untargeted(y), LINF)
    # 0.3 is the least value: that code cannot fall, so there is no way left for its pixel
    torch.testing.assert_close(result.x_adv.flatten(), torch.tensor([0.3, 0.82, 0.68, 0.52]))
    fixed = Latent(rounds=1, latent_steps=1, steps=1, step_size=0.03)(victim, x, untargeted(y), LINF)
    torch.testing.assert_close(fixed.x_adv.flatten(), torch.tensor([0.3, 0.83, 0.67, 0.53]))
    free = Latent(rounds=1, latent_steps=1, steps=1, step_size=0.03, headroom=0.0)(victim, x, untargeted(y), LINF)
    torch.testing.assert_close(free.x_adv.flatten(), torch.tensor([0.3, 0.8, 0.67, 0.53]))


def test_the_image_stops_where_it_has_the_codes_and_the_codes_where_their_steps_end() -> None:
    """Three steps of 0.02 move two codes by 0.06; a pixel that reaches its code turns back once its momentum does."""
    victim = pixels_as_codes([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]])
    x, y = torch.tensor([0.2, 0.6, 0.5]).view(1, 1, 1, 3), torch.tensor([0])
    attack = Latent(rounds=1, latent_steps=3, latent_step=0.02, steps=4, step_size=0.025)
    result = attack(victim, x, untargeted(y), ThreatModel("linf", 0.3))
    # the first is away -0.06, -0.035, -0.01, +0.015: the sums of signs are 1, 2, 3, 2, so all its steps go up
    torch.testing.assert_close(result.x_adv.flatten(), torch.tensor([0.3, 0.6, 0.4]))
    once = Latent(rounds=1, latent_steps=1, latent_step=0.02, steps=4, step_size=0.025)
    ended = once(victim, x, untargeted(y), ThreatModel("linf", 0.3)).x_adv.flatten()
    # away -0.02, +0.005, +0.005, -0.02: 1, then 0 (which is no direction), then -1, then 0 again
    torch.testing.assert_close(ended, torch.tensor([0.2, 0.6, 0.5]))


def plainly(
    x: Tensor, y: Tensor, threat: ThreatModel, layer: str, whole: bool, l2: float | None, rounds: int
) -> Tensor:  # fmt: skip
    """The attack as it is described, 3 latent steps and 4 of the image; `whole` takes ranges and norms over all."""
    lower, upper = trained_network().split(layer)
    x_adv = x.clone()
    for _ in range(rounds):
        z = lower(x_adv).detach()
        aim = z.clone()
        places = tuple(range(2, z.dim()))
        axes = (0, *places) if whole else places
        low, high = z.amin(axes, keepdim=True), 1.1 * z.amax(axes, keepdim=True)
        for _ in range(3):
            aim.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(upper(aim), y, reduction="sum"), aim)
            if l2 is None:
                moved = aim.detach() + 0.02 * g.sign()
            else:
                norms = g.norm() if whole else g.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1))
                shift = aim.detach() + 0.02 * g / norms - z
                length = shift.norm() if whole else shift.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1))
                moved = z + shift * (l2 / length).clamp(max=1)
            aim = torch.minimum(torch.maximum(moved, low), high).detach()
        m = torch.zeros_like(x)
        for _ in range(4):
            x_adv.requires_grad_()
            (g,) = torch.autograd.grad((lower(x_adv) - aim).abs().sum(), x_adv)
            total = g.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
            m = m + torch.where(total > 0, g / total, torch.zeros_like(g))
            way = m.sign() if threat.norm == "linf" else m / m.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x_adv = threat.project(x_adv.detach() - threat.radius / 8 * way, x)
    return x_adv


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.008), ThreatModel("l2", 0.03)])
@pytest.mark.parametrize("layer", ["conv1", "conv2"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("l2", [None, 0.05])
def test_it_is_the_plain_loop(threat: ThreatModel, layer: str, whole: bool, l2: float | None) -> None:
    """On images that stand throughout: with the ranges of a batch, those that fall would change it."""
    victim, x, y = some_digits()
    right = (victim.decide(x) == y).nonzero()[:8, 0]
    x, y = x[right], y[right]
    ball: dict[str, Any] = {} if l2 is None else {"latent_norm": "l2", "latent_radius": l2}
    attack = Latent(
        rounds=2, latent_steps=3, latent_step=0.02, steps=4, relative_step=1 / 8, layer=layer,
        bounds="batch" if whole else "image", **ball,
    )  # fmt: skip
    result = attack(victim, x, untargeted(y), threat)
    assert not bool(result.success.any())
    torch.testing.assert_close(result.x_adv, plainly(x, y, threat, layer, whole, l2, 2), rtol=0, atol=2e-6)
    assert not torch.equal(result.x_adv, plainly(x, y, threat, layer, whole, l2, 1))


def test_the_usual_steps_of_the_codes() -> None:
    x = (0.4 + 0.2 * torch.rand(3, 1, 1, 8, generator=torch.Generator().manual_seed(0))).clone()
    z, slope = x.flatten(1), torch.tensor([[3.0, -4.0, *[0.0] * 6]]).repeat(3, 1)
    moved = Latent()._moved(z, slope, z) - z
    torch.testing.assert_close(moved, 0.01 * slope.sign())
    l2 = Latent(latent_norm="l2", latent_radius=2.0, latent_steps=5)._moved(z, slope, z) - z
    torch.testing.assert_close(l2, slope / 5 * 1.0, msg="2.5 radii over 5 steps")
    cut = Latent(latent_norm="l2", latent_radius=2.0, latent_step=7.0)._moved(z, slope, z) - z
    torch.testing.assert_close(cut, slope / 5 * 2.0)
    whole = Latent(latent_norm="l2", latent_radius=2.0, latent_step=7.0, bounds="batch")._moved(z, slope, z) - z
    torch.testing.assert_close(whole, slope / 5 * 2.0 / 3**0.5)
    assert Latent().latent_radius == 150 and Latent().latent_step is None


# --- ranges -------------------------------------------------------------------------------------------------


def test_the_range_is_each_images_or_that_of_all_with_room_above() -> None:
    z = torch.tensor([[[[0.0, 2.0]], [[-5.0, -1.0]]], [[[7.0, 1.0]], [[-4.0, -2.0]]]])
    low, high = Latent(bounds="image")._range(z)
    assert low[..., 0, 0].tolist() == [[0, -5], [1, -4]]
    torch.testing.assert_close(high[..., 0, 0], torch.tensor([[2.2, -0.9], [7.7, -1.8]]))
    low, high = Latent(bounds="batch", headroom=0.5)._range(z)
    assert low.flatten().tolist() == [0, -5] and high.flatten().tolist() == [10.5, -0.5]
    flat = torch.tensor([[0.0, 3.0], [2.0, -1.0]])
    low, high = Latent(headroom=0.0)._range(flat)
    assert low.tolist() == [[0], [-1]] and high.tolist() == [[3], [2]], "an image's own units are all one range"
    low, high = Latent(bounds="batch", headroom=0.0)._range(flat)
    assert low.tolist() == [[0, -1]] and high.tolist() == [[2, 3]]


@pytest.mark.parametrize("bounds", ["image", "batch"])
def test_only_the_ranges_of_a_batch_make_an_image_depend_on_others(bounds: Any) -> None:
    victim, x, y = some_digits()
    attack = Latent(rounds=2, steps=5, latent_step=0.05, bounds=bounds)
    together = attack(victim, x, untargeted(y), LINF).x_adv
    apart = torch.cat([attack(victim, x[i : i + 8], untargeted(y[i : i + 8]), LINF).x_adv for i in range(0, 40, 8)])
    assert torch.allclose(together, apart, atol=1e-6) == (bounds == "image")


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", 0.8)])
def test_it_fells_images_and_keeps_the_ball(threat: ThreatModel) -> None:
    victim, x, y = some_digits()
    right = victim.decide(x) == y
    result = Latent()(victim, x, untargeted(y), threat)
    assert int(result.success[right].sum()) >= 0.3 * int(right.sum())
    assert bool(threat.contains(result.x_adv, x).all())
    assert torch.equal(victim.decide(result.x_adv) != y, result.success)
    assert torch.equal(result.x_adv[~right], x[~right]), "what is wrong from the start falls with the first look"
    again = Latent()(victim, x, untargeted(y), threat, seed=5)
    assert torch.equal(again.x_adv, result.x_adv), "it draws nothing"


def test_more_rounds_fell_more() -> None:
    victim, x, y = some_digits()
    found = [int(Latent(rounds=n, steps=4)(victim, x, untargeted(y), LINF).success.sum()) for n in (1, 3, 15)]
    assert found[0] < found[1] <= found[2]


def test_towards_a_class() -> None:
    victim, x, y = some_digits()
    goal = targeted(y, (y + 1) % 10)
    result = Latent()(victim, x, goal, ThreatModel("linf", 0.3))
    assert int(result.success.sum()) >= 10
    assert torch.equal(result.prediction[result.success], goal.targets[result.success])  # type: ignore[index]


def test_it_follows_the_true_label() -> None:
    victim, x, y = some_digits()
    wrong = victim.decide(x).roll(1)
    attack = Latent(rounds=1, steps=3)
    behind = Behind(victim.classifier, input_shape=(1, 8, 8), num_classes=10)
    found, other = (attack(behind, x, untargeted(labels), LINF).x_adv for labels in (y, wrong))
    assert not torch.allclose(found, other)


def test_the_first_layer_is_moved_unless_another_is_named() -> None:
    victim, x, y = some_digits()
    first, named, other = (
        Latent(rounds=1, layer=layer)(victim, x, untargeted(y), LINF).x_adv for layer in (None, "conv1", "fc1")
    )
    assert torch.equal(first, named) and not torch.equal(first, other)


def test_where_the_codes_have_no_slope_nothing_moves() -> None:
    victim = pixels_as_codes([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    x = torch.tensor([0.2, 0.6, 0.5]).view(1, 1, 1, 3)
    for norm in ("linf", "l2"):
        attack = Latent(rounds=2, steps=3, latent_norm=norm)
        for ball in (LINF, ThreatModel("l2", 0.3)):
            assert torch.equal(attack(victim, x, untargeted(torch.tensor([0])), ball).x_adv, x)


# --- what it counts -----------------------------------------------------------------------------------------


def test_it_counts_every_pass_of_either_half_and_fallen_images_leave() -> None:
    _, x, y = some_digits()
    network = fresh_network()
    network.load_state_dict(trained_network().state_dict())
    looks: list[int] = []
    gradients: list[int] = []

    def leaf(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given[0].requires_grad and given[0].is_leaf:
            given[0].register_hook(lambda g: gradients.append(len(g)))

    network.head.register_forward_pre_hook(lambda module, given: looks.append(len(given[0])))
    for part in (network, network.body["conv2"]):  # an image, or codes that are moved themselves
        part.register_forward_pre_hook(leaf)
    victim = system(network, (1, 8, 8), 10)
    attack = Latent(rounds=3, latent_steps=4, steps=5)
    result = attack(victim, x, untargeted(y), LINF)
    assert sum(looks) == int(result.cost.forwards.sum() + result.cost.queries.sum())
    assert sum(gradients) == int(result.cost.backwards.sum())
    bound = attack.passes(victim.views()["adaptive"], 40)
    assert bound == (40 * 3 * 9, 40 * 3 * 9, 40 * 4)
    standing = ~result.success
    assert result.cost.forwards[standing].tolist() == [28] * int(standing.sum())  # and the verification
    assert result.cost.backwards[standing].tolist() == [27] * int(standing.sum())
    assert result.cost.queries[standing].tolist() == [4] * int(standing.sum())
    assert int(result.cost.forwards[result.success].sum()) < 28 * int(result.success.sum())
    assert not network.body["conv1"]._forward_hooks


def test_behind_a_purification_the_codes_are_those_of_what_it_makes() -> None:
    """Its passes are paid for with every step of the image, and not with those of the codes."""
    _, x, y = some_digits()
    behind = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10, purification=Shift())
    attack = Latent(rounds=2, latent_steps=4, steps=5)
    seen: list[Tensor] = []
    handle = behind.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    result = attack(behind, x, untargeted(y), LINF)
    handle.remove()
    assert torch.equal(seen[0], (x + 0.02).clamp(0, 1))
    assert attack.passes(behind.views()["adaptive"], 40) == (40 * 2 * (10 + 4), 40 * 2 * (10 + 4), 40 * 3)
    standing = ~result.success
    assert result.cost.forwards[standing].unique().tolist() == [28 + 2]
    assert result.cost.backwards[standing].unique().tolist() == [28 + 1]
    assert bool(result.success.any())


def test_without_a_sight_of_success_the_highest_margin_is_kept() -> None:
    seen, x, y = some_digits()
    behind = Behind(seen.classifier, input_shape=(1, 8, 8), num_classes=10)
    attack = Latent(rounds=3, latent_steps=4, steps=8)
    open_, hidden = attack(seen, x, untargeted(y), LINF), attack(behind, x, untargeted(y), LINF)
    assert torch.equal(hidden.success, open_.success)  # the best margin of all iterates is a success if any is
    assert hidden.cost.forwards.tolist() == [37] * 40 and hidden.cost.queries.tolist() == [4] * 40


def test_noise_of_the_upper_half_is_drawn_by_the_seed_and_costs_no_global_draw() -> None:
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(1, 4, 3),
        "noisy": nn.Sequential(GaussianNoise(0.3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)),
    }
    network = Classifier(input_shape=(1, 8, 8), num_classes=10, layers=layers, head=nn.Linear(8, 10)).eval()
    _, x, y = some_digits()

    def found(seed: int) -> Tensor:
        victim = RandomisedSystem(network, input_shape=(1, 8, 8), num_classes=10, ensemble=2, draws=2, votes=2)
        return Latent(rounds=2, latent_steps=2, steps=3)(victim, x, untargeted(y), LINF, seed).x_adv

    before = torch.get_rng_state()
    one, same, other = found(1), found(1), found(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_mistakes_are_said_in_one_line() -> None:
    victim, x, y = some_digits()
    with pytest.raises(UserError, match="no layer 'conv9'; layers: conv1, conv2, fc1"):
        Latent(layer="conv9")(victim, x, untargeted(y), LINF)
    bare = linear_system(torch.eye(64)[:10], shape=(1, 8, 8))
    with pytest.raises(UserError, match="needs the layers of the classifier, and this system shows none"):
        Latent()(bare, x, untargeted(y), LINF)
    assert Latent.reads_layers, "so where memory is short its batch is not cut inside the network"
