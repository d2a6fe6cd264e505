"""IMT: the exact move, the limited form's half step, determinism, modes, and the adaptive view's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import batch, linear_network, normed_network
from torch import Tensor, nn

from casemate.networks.base import Classifier
from casemate.networks.critics import Critic, WideCritic
from casemate.purification.imt import IMT
from casemate.system import TorchSystem
from casemate.threat import ThreatModel


class LinearCritic(Critic):
    """z = scale * w . codes + bias."""

    def __init__(self, weight: list[float], bias: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(nn.Sequential(), len(weight), 2, "conv1x1")
        self.score.weight.data = scale * torch.tensor([weight])
        self.score.bias.data = torch.tensor([bias])


def pair() -> tuple[Classifier, Critic]:
    """A classifier and a critic with batch norm, whose running statistics have seen something; in TRAIN mode."""
    f = normed_network()
    torch.manual_seed(5)
    critic = WideCritic(4, 4, form="conv1x1", depth=10, width=1)
    x, _ = batch(16)
    for _ in range(5):
        critic(f(x))
    return f.train(), critic.train()


def image(*pixels: float) -> Tensor:
    return torch.tensor(pixels).view(1, 1, 1, 2)


def test_the_move_is_the_radius_towards_clean() -> None:
    f = linear_network([[2.0, 0.0], [0.0, -3.0]])
    imt = IMT(f, LinearCritic([1.0, 1.0]), radius=0.1)  # dz/dx = (2, -3)
    torch.testing.assert_close(imt(image(0.5, 0.5)), image(0.6, 0.4))
    torch.testing.assert_close(imt(image(0.95, 0.05)), image(1.0, 0.0))
    towards_adversarial = IMT(f, LinearCritic([-1.0, -1.0]), radius=0.1)
    torch.testing.assert_close(towards_adversarial(image(0.5, 0.5)), image(0.4, 0.6))


def test_a_constant_critic_moves_nothing() -> None:
    x = torch.rand(4, 1, 1, 2)
    imt = IMT(linear_network([[2.0, 1.0], [0.0, -3.0]]), LinearCritic([0.0, 0.0], bias=1.0), radius=0.3)
    assert torch.equal(imt(x), x)
    torch.testing.assert_close(imt.score(x), torch.full((4,), 0.7310586))


def test_no_radius_is_no_purification() -> None:
    f, critic = pair()
    x, _ = batch()
    imt = IMT(f, critic, radius=0.0)
    system = TorchSystem(f, input_shape=(1, 6, 6), num_classes=4, purification=imt)
    plain = TorchSystem(f, input_shape=(1, 6, 6), num_classes=4)
    with system.frozen():
        assert torch.equal(imt(x), x)
        assert torch.equal(system.logits(x), plain.logits(x))


@pytest.mark.parametrize(
    ("score", "moved"), [(0.29, 0.1), (0.31, 0.05), (0.5, 0.05), (0.69, 0.05), (0.71, 0.1), (0.999, 0.1)]
)
def test_the_interval_rule_halves_the_step_inside_the_band(score: float, moved: float) -> None:
    bias = float(torch.tensor(score).logit())
    f = linear_network([[1.0, 0.0], [0.0, 1.0]])
    critic = LinearCritic([1e-6, 1e-6], bias=bias)
    limited = IMT(f, critic, radius=0.1, rule="interval", band=(0.3, 0.7))
    x = image(0.5, 0.25)
    assert float(limited.score(x)) == pytest.approx(score, abs=1e-4)
    torch.testing.assert_close(limited(x) - x, torch.full_like(x, moved))
    torch.testing.assert_close(IMT(f, critic, radius=0.1)(x) - x, torch.full_like(x, 0.1))


def test_strength_is_each_samples_own() -> None:
    f = linear_network([[1.0, 0.0], [0.0, 0.0]])
    limited = IMT(f, LinearCritic([10.0, 0.0]), radius=0.1, rule="interval")  # z = 10 x_0
    x = torch.cat([image(0.0, 0.5), image(0.5, 0.5)])  # scores .5 and .993
    torch.testing.assert_close(limited(x)[:, 0, 0, 0], torch.tensor([0.05, 0.6]))


def test_a_saturated_critic_still_moves_the_input() -> None:
    """sigmoid(z) is exactly 1 in float32 there, and the gradient of its cross-entropy exactly 0."""
    imt = IMT(linear_network([[1.0, 0.0], [0.0, 1.0]]), LinearCritic([1.0, 1.0], scale=1e4), radius=0.1)
    x = image(0.5, 0.25)
    assert float(imt.score(x)) == 1.0
    torch.testing.assert_close(imt(x), image(0.6, 0.35))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_move_is_the_radius_where_unclipped_and_within_it_everywhere(steps: int) -> None:
    f, critic = pair()
    x, _ = batch()
    imt = IMT(f, critic, radius=0.05, steps=steps, step=1.0)
    moved = imt(x)
    assert float((moved - x).abs().max()) <= 0.05 + 1e-6
    if steps == 1:
        torch.testing.assert_close((moved - x).abs(), torch.full_like(x, 0.05))
    edge = imt(x.round())
    assert float(edge.min()) == 0.0 and float(edge.max()) == 1.0


def test_several_steps_follow_the_gradient_where_it_turns() -> None:
    class Peak(Critic):
        """z = -(x_0 - .53)^2: one step of .1 overshoots the top, steps of .01 walk to it."""

        def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
            return -((codes[:, 0] - 0.53) ** 2), codes

    f, peak = linear_network([[1.0, 0.0], [0.0, 1.0]]), Peak(nn.Sequential(), 2, 2, "conv1x1")
    x = image(0.5, 0.5)
    assert float(IMT(f, peak, radius=0.1)(x)[0, 0, 0, 0]) == pytest.approx(0.6)
    walked = IMT(f, peak, radius=0.1, steps=9, step=0.1)
    assert float(walked(x)[0, 0, 0, 0]) == pytest.approx(0.53, abs=0.011)
    assert walked.passes == (9, 9)


def test_the_first_score_sets_the_reach_of_all_steps() -> None:
    """z = 10 x_0 - 4: the image starts inside the band and leaves it on the way."""
    limited = IMT(
        linear_network([[10.0, 0.0], [0.0, 0.0]]), LinearCritic([1.0, 0.0], bias=-4.0), radius=0.2, rule="interval",
        steps=4, step=1.0,
    )  # fmt: skip
    assert float(limited.score(image(0.4, 0.5))) == pytest.approx(0.5)
    assert float(limited.score(image(0.5, 0.5))) > 0.7
    torch.testing.assert_close(limited(image(0.4, 0.5)), image(0.5, 0.5))


def test_it_is_deterministic_and_each_image_is_on_its_own() -> None:
    """With the modules left in train mode: a batch-norm critic would make the answer depend on the neighbours."""
    f, critic = pair()
    x, _ = batch()
    before = {k: v.clone() for m in (f, critic) for k, v in m.state_dict().items()}
    imt = IMT(f, critic, radius=0.05, rule="interval")
    once = imt(x)
    assert torch.equal(imt(x), once)
    apart = torch.cat([imt(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(apart, once)
    torch.testing.assert_close(imt.score(x)[2:3], imt.score(x[2:3]))
    assert f.training and critic.training
    assert all(torch.equal(before[k], v) for m in (f, critic) for k, v in m.state_dict().items())
    assert all(p.requires_grad and p.grad is None for m in (f, critic) for p in m.parameters())


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_runs_whatever_the_surrounding_gradient_mode(surrounding: Any) -> None:
    f, critic = pair()
    x, _ = batch()
    imt = IMT(f, critic, radius=0.05)
    expected = imt(x)
    system = TorchSystem(f, input_shape=(1, 6, 6), num_classes=4, purification=imt)
    with system.frozen(), surrounding():
        found = imt(x.clone())
        assert torch.equal(found, expected) and not found.requires_grad
        assert torch.equal(system.logits(x), f(expected))


@pytest.mark.parametrize("latent", ["logits", "penultimate"])
def test_the_move_raises_the_score(latent: Any) -> None:
    f, _ = pair()
    torch.manual_seed(2)
    size = 4 if latent == "logits" else 6
    critic = WideCritic(size, 4, form="conv1x1", depth=10, width=1)
    if latent == "penultimate":  # the last map before the pool is 4 x 4
        critic = WideCritic(size, 4, form="conv3x3", depth=10, width=1)
    x, _ = batch()
    imt = IMT(f, critic, radius=1e-3, latent=latent)
    assert bool((imt.score(imt(x)) > imt.score(x)).all())
    z, logits = imt.readout(x)
    assert z.shape == (8,) and torch.equal(logits, f(x))


def test_the_adaptive_view_has_the_exact_gradient() -> None:
    """d x_t / d x is the identity almost everywhere, so the view's gradient fits finite differences (float64)."""
    f, critic = pair()
    f, critic = f.double(), critic.double()
    x, y = batch()
    x = x.double()
    system = TorchSystem(
        f, input_shape=(1, 6, 6), num_classes=4, purification=IMT(f, critic, radius=0.05, rule="interval")
    )
    view = system.views()["adaptive"]
    with system.frozen():
        at = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(view.logits(at).gather(1, y[:, None]).sum(), at)
        g = torch.Generator().manual_seed(0)
        direction = torch.randn(x.shape, generator=g, dtype=x.dtype)
        h = 1e-8
        slope = (system.logits(x + h * direction) - system.logits(x - h * direction)).gather(1, y[:, None]) / (2 * h)
        torch.testing.assert_close(slope.flatten(), (gradient * direction).flatten(1).sum(1), rtol=1e-4, atol=1e-6)
    assert view.passes == (2, 2)


def test_the_systems_hash_knows_critic_and_rule() -> None:
    f, critic = pair()

    def hashed(**options: Any) -> str:
        imt = IMT(f, critic, radius=0.05, **options)
        return TorchSystem(f, input_shape=(1, 6, 6), num_classes=4, purification=imt).hash()

    first = hashed()
    assert hashed() == first
    assert hashed(rule="interval") != first
    with torch.no_grad():
        critic.score.bias += 1e-3
    assert hashed() != first
    assert ThreatModel("linf", 0.05).contains(IMT(f, critic, radius=0.05)(batch()[0]), batch()[0]).all()
