"""AdvGAN: a pair of networks fitted by the loop, judged like any other attack."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attack_toys import digits, system, trained_network
from learned_toys import LINF, SHAPE, context, fit, fresh, strike
from torch import Tensor, nn

from casemate.attacks.advgan import AdvGAN, AdvGANTrainer, Critic, Generator
from casemate.errors import UserError
from casemate.threat import ThreatModel, untargeted

SPEC = AdvGANTrainer(blocks=1)


@functools.cache
def fitted() -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    return fit(SPEC, epochs=6)


def test_the_loop_fits_it_until_little_stands() -> None:
    before = {k: v.clone() for k, v in trained_network().state_dict().items()}
    weights, curves = fitted()
    assert all(torch.equal(v, before[k]) for k, v in trained_network().state_dict().items())
    assert curves[-1]["fooled"] > 0.75 > curves[0]["fooled"] and "loss" in curves[0]
    done = strike(AdvGAN(), SPEC, weights)
    assert done.success.float().mean() > 0.75
    assert strike(AdvGAN(), SPEC, fresh(SPEC)).success.float().mean() < 0.3
    assert int(done.cost.backwards.sum() + done.cost.queries.sum()) == 0
    assert done.cost.forwards.tolist() == [1] * len(done.success)


def test_an_image_does_not_feel_its_batch() -> None:
    x, y = (part[1500:1520] for part in digits())
    victim = system(trained_network(), (1, 8, 8), 10)
    bound = AdvGAN().with_weights(SPEC, fitted()[0], **SHAPE)
    whole, one = (bound(victim, x[rows], untargeted(y[rows]), LINF) for rows in (slice(None), slice(7, 8)))
    assert torch.allclose(whole.x_adv[7:8], one.x_adv, atol=1e-6)


def test_the_critic_learns_first_and_each_loss_moves_its_own_player() -> None:
    ctx = context(SPEC)
    x, y = (part[:32] for part in digits())
    adam = {name: torch.optim.Adam(module.parameters(), 3e-3) for name, module in ctx.modules.items()}
    history: dict[str, list[float]] = {"critic": [], "generator": []}
    for _ in range(15):
        order = []
        for update in SPEC.step(ctx, x, y):
            (name,) = update.players
            order.append(name)
            adam[name].zero_grad()
            loss = update.loss()
            torch.autograd.backward(loss, inputs=list(ctx.modules[name].parameters()))
            adam[name].step()
            history[name].append(float(loss.detach()))
        assert order == ["critic", "generator"]
    assert history["generator"][-1] < history["generator"][0] and history["critic"][-1] < history["critic"][0]
    assert all(p.grad is None for p in trained_network().parameters())


def losses(wrong: int = 0, **changes: Any) -> float:
    """The generator's first loss, on labels moved by `wrong`."""
    spec = AdvGANTrainer(**({"width": 4, "blocks": 1} | changes))
    ctx = context(spec)
    with torch.no_grad():
        for p in ctx.modules["generator"].parameters():
            p.mul_(20)  # far from silent
    x, y = (part[:16] for part in digits())
    _critic, generator = spec.step(ctx, x, (y + wrong) % 10)
    return float(generator.loss().detach())


def test_the_generators_loss_is_the_weighted_sum_of_three() -> None:
    hidden = losses(adversarial=0.0, distance=0.0)
    assert 0 < hidden < 1 and losses(gan=0.0, adversarial=0.0, distance=0.0) == 0
    far = losses(gan=0.0, adversarial=0.0)
    assert losses(gan=0.0, adversarial=0.0, free_distance=1.0) == pytest.approx(far - 1.0, rel=1e-4)
    assert losses(gan=0.0, adversarial=0.0, free_distance=1e3) == 0
    margin = losses(gan=0.0, distance=0.0, adversarial=1.0)
    assert losses(adversarial=2.0, distance=3.0) == pytest.approx(hidden + 3 * far + 2 * margin, rel=1e-4)
    assert losses(gan=0.0, distance=0.0, adversarial=1.0, scores="softmax") <= 1
    cut = [losses(1, gan=0.0, distance=0.0, adversarial=1.0, kappa=kappa) for kappa in (0.0, 2.0, 1e3)]
    assert abs(cut[0]) < 0.5 and -2 <= cut[1] < cut[0] and cut[2] < cut[1]  # wrong labels are past their border


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 12, 20)])
def test_images_of_several_sizes_come_back_inside_the_budget(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, *shape)
    assert Generator(shape[0], 4, 1)(x).shape == x.shape
    score = Critic(shape[0], 4)(x)
    assert score.shape == (4,) and score.min() > 0 and score.max() < 1
    victim = system(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10)), shape, 10)
    spec = AdvGANTrainer(width=4, blocks=1)
    modules = spec.build(shape, 10)
    weights = {f"{name}.{key}": v for name, module in modules.items() for key, v in module.state_dict().items()}
    bound = AdvGAN().with_weights(spec, weights, input_shape=shape, num_classes=10)
    small = ThreatModel("linf", 0.001)
    assert small.contains(bound(victim, x, untargeted(torch.zeros(4, dtype=torch.long)), small).x_adv, x).all()


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="multiples of 4, not 1x10x12"):
        SPEC.build((1, 10, 12), 10)
    with pytest.raises(UserError, match="at least 8 x 8 pixels, not 4 x 4"):
        SPEC.build((1, 4, 4), 10)
