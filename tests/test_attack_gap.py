"""The learned attack: fitted by the training loop against a frozen victim, then bound by its weights."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from attack_toys import digits, system, trained_network
from sklearn.datasets import load_digits
from torch import Tensor, nn

from casemate.attacks.gap import GAP, GAPTrainer
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.errors import UserError
from casemate.registry import names, resolve
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Task
from casemate.training.loop import train
from casemate.training.recipe import Recipe

LINF = ThreatModel("linf", 0.3)
SHAPE: Any = {"input_shape": (1, 8, 8), "num_classes": 10}
SMALL = GAPTrainer(width=8, blocks=1)


def weights_of(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


@functools.cache
def fitted() -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights and curves of a generator fitted to the trained digits network: about 190 steps."""
    bunch = load_digits()
    images = (bunch.images[:1500, :, :, None] * (255 / 16)).round().astype("uint8")
    recipe = Recipe(epochs=8, lr=3e-3, optimizer="adam", batch_size=64, precision="fp32")
    task = Task(**SHAPE, threat=LINF, network=nn.Identity, player=recipe.player, victim=trained_network())
    data = DeviceData(Images(images, bunch.target[:1500]))
    trained = train(SMALL, task, data, None, recipe, seed=0, device="cpu")
    return weights_of(trained.modules), trained.curves


def test_the_loop_fits_it_to_an_undefended_victim_until_little_stands() -> None:
    before = {k: v.clone() for k, v in trained_network().state_dict().items()}
    weights, curves = fitted()
    assert all(torch.equal(v, before[k]) for k, v in trained_network().state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in trained_network().parameters())
    assert curves[-1]["fooled"] > 0.9 > curves[0]["fooled"]

    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    result = GAP().with_weights(SMALL, weights, **SHAPE)(victim, x[1500:], untargeted(y[1500:]), LINF)
    assert result.success.float().mean() > 0.9
    fresh = GAP().with_weights(SMALL, weights_of(SMALL.build((1, 8, 8), 10)), **SHAPE)
    assert fresh(victim, x[1500:], untargeted(y[1500:]), LINF).success.float().mean() < 0.7


def test_it_costs_the_victim_one_look_and_an_image_does_not_feel_its_batch() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    attack = GAP().with_weights(SMALL, fitted()[0], **SHAPE)
    result = attack(victim, x[:20], untargeted(y[:20]), LINF)
    assert result.cost.forwards.tolist() == [1] * 20 and int(result.cost.backwards.sum()) == 0
    assert attack.passes(victim.views()["adaptive"], 20) == (0, 0, 0)
    assert attack.needs == {"labels"}
    one = attack(victim, x[7:8], untargeted(y[7:8]), LINF)
    assert torch.allclose(one.x_adv, result.x_adv[7:8], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 5, 7)])
def test_images_of_any_size_come_back_inside_the_budget(norm: Any, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    modules = GAPTrainer(width=4, blocks=1).build(shape, 10)
    spec = GAPTrainer(width=4, blocks=1)
    attack = GAP().with_weights(spec, weights_of(modules), input_shape=shape, num_classes=10)
    victim = system(nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 10)), shape, 10)
    x, threat = torch.rand(5, *shape), ThreatModel(norm, 0.2)
    x_adv = attack(victim, x, untargeted(torch.zeros(5, dtype=torch.long)), threat).x_adv
    assert threat.contains(x_adv, x).all() and threat.distance(x_adv, x).min() > 0.01


@pytest.mark.parametrize("objective", ["ce", "margin"])
def test_a_step_moves_the_generator_alone_and_raises_the_victims_loss(objective: Any) -> None:
    spec = GAPTrainer(width=4, blocks=1, objective=objective)
    torch.manual_seed(0)
    modules, victim = spec.build((1, 8, 8), 10), copy.deepcopy(trained_network())
    x, y = (part[:64] for part in digits())
    ctx = Context(modules=modules, threat=LINF, victim=victim)
    optimizer = torch.optim.Adam(modules["generator"].parameters(), 1e-3)
    losses = []
    for _ in range(10):
        (update,) = spec.step(ctx, x, y)
        assert update.players == ("generator",)
        optimizer.zero_grad()
        loss = update.loss()
        torch.autograd.backward(loss, inputs=list(modules["generator"].parameters()))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in victim.parameters())
    assert 0 <= float(ctx.logs["fooled"]) <= 1


def test_its_weights_identify_it() -> None:
    torch.manual_seed(0)
    one, other = (weights_of(SMALL.build((1, 8, 8), 10)) for _ in range(2))
    first = GAP().with_weights(SMALL, one, **SHAPE).parameters()
    copied = {k: v.clone() for k, v in one.items()}
    assert first == GAP(generator="another_name").with_weights(SMALL, copied, **SHAPE).parameters()
    assert first["weights"] != GAP().with_weights(SMALL, other, **SHAPE).parameters()["weights"]
    assert first["width"] == 8 and first["objective"] == "margin"


def test_mistakes_are_named() -> None:
    x, y = digits()
    victim = system(trained_network(), (1, 8, 8), 10)
    with pytest.raises(UserError, match="attack GAP needs its weights: call with_weights first"):
        GAP()(victim, x[:2], untargeted(y[:2]), LINF)
    with pytest.raises(UserError, match="weights do not fit GAPTrainer") as caught:
        GAP().with_weights(GAPTrainer(width=16), weights_of(SMALL.build((1, 8, 8), 10)), **SHAPE)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="at least 4 x 4 pixels, not 2 x 9"):
        SMALL.build((1, 2, 9), 10)
    with pytest.raises(UserError, match="fitted against a victim, and this run has none"):
        next(SMALL.step(Context(modules={}, threat=LINF), x, y))


def test_every_learned_attack_has_an_attack_of_its_name_that_wants_its_weights() -> None:
    for name in names("learned_attack"):
        assert resolve("attack", name).binds == "weights"
