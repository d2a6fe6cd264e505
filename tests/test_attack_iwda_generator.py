"""IWDA with one generator for a data set: fitted by the loop, bound by its weights, held by a budget of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from iwda_toys import LINF, SHAPE, network, pictures, victim
from learned_toys import weights_of
from torch import Tensor, nn

from casemate.attacks.gap import GAPTrainer
from casemate.attacks.internal import IWDBudget
from casemate.attacks.iwda_generator import IWDAGenerator, IWDAGeneratorTrainer
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.errors import UserError
from casemate.networks.singan import PatchCritic
from casemate.threat import ThreatModel, targeted, untargeted
from casemate.trainable import Context, Task
from casemate.training.loop import train
from casemate.training.recipe import Recipe

SIZE: Any = {"input_shape": SHAPE, "num_classes": 10}
SMALL: dict[str, Any] = {"width": 8, "projections": 16}
SPEC = IWDAGeneratorTrainer(**SMALL)


def context(spec: IWDAGeneratorTrainer) -> Context:
    torch.manual_seed(0)
    modules = {name: module.train() for name, module in spec.build(SHAPE, 10).items()}
    ctx = Context(modules=modules, threat=LINF, victim=network())
    ctx.rng.manual_seed(0)
    return ctx


def play(spec: IWDAGeneratorTrainer, ctx: Context, x: Tensor, y: Tensor, rate: float = 1e-3) -> list[str]:
    """One batch, by plain gradient steps; who moved, in order."""
    order = []
    for update in spec.step(ctx, x, y):
        moving = [p for name in update.players for p in ctx.modules[name].parameters()]
        before = {name: [p.clone() for p in module.parameters()] for name, module in ctx.modules.items()}
        for p, g in zip(moving, torch.autograd.grad(update.loss(), moving), strict=True):
            p.data.sub_(rate * g)
        for name, module in ctx.modules.items():
            same = all(torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True))
            assert same == (name not in update.players)
        order += update.players
    return order


def fitted(
    spec: IWDAGeneratorTrainer, epochs: int = 5, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    x, y = pictures(128)
    pixels = (x.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    recipe = Recipe(
        **({"epochs": epochs, "lr": 1e-3, "optimizer": "adam", "batch_size": 16, "precision": "fp32"} | changes)
    )
    task = Task(**SIZE, threat=LINF, network=nn.Identity, player=recipe.player, victim=network())
    trained = train(spec, task, DeviceData(Images(pixels, y.numpy())), None, recipe, seed=0, device="cpu")
    return weights_of(trained.modules), trained.curves


def fresh(spec: IWDAGeneratorTrainer) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return weights_of(spec.build(**SIZE))


@pytest.mark.parametrize("matching", ["conditional", "sliced"])
def test_the_loop_fits_it_until_the_victim_errs_on_pictures_still_alike(matching: Any) -> None:
    spec = IWDAGeneratorTrainer(**SMALL, tau=1.0, objective="margin", matching=matching, critic_steps=1)
    weights, curves = fitted(spec)
    assert curves[-1]["fooled"] > max(0.6, 1.5 * curves[0]["fooled"])
    x, y = pictures(160)
    bound = IWDAGenerator(samples=2).with_weights(spec, weights, **SIZE)
    result = bound(victim(), x[128:], untargeted(y[128:]), LINF)
    assert result.success.float().mean() > 0.4
    assert (result.x_adv - x[128:]).abs().mean() < 0.25


@pytest.mark.parametrize("matching", ["conditional", "pooled", "sliced"])
def test_who_moves_when(matching: Any) -> None:
    spec = IWDAGeneratorTrainer(**SMALL, matching=matching, critic_steps=2)
    ctx = context(spec)
    expected = ["generator"] if matching == "sliced" else ["critic", "critic", "generator"]
    assert play(spec, ctx, *pictures(4)) == expected
    assert ("critic" in ctx.modules) == (matching != "sliced") and {"fooled", "apart"} <= set(ctx.logs)
    assert all(p.grad is None for p in ctx.victim.parameters())  # type: ignore[union-attr]
    if matching != "sliced":
        critic = next(m for m in ctx.modules["critic"].modules() if isinstance(m, PatchCritic))
        assert critic.body[0].in_channels == (2 if matching == "conditional" else 1)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in critic.modules())


def test_one_pass_of_the_victim_per_batch() -> None:
    ctx, calls = context(SPEC), []
    inner = ctx.victim
    ctx.victim = nn.Identity()
    ctx.victim.forward = lambda x: (calls.append(len(x)), inner(x))[1]  # type: ignore[method-assign, misc, assignment]
    play(SPEC, ctx, *pictures(4))
    assert calls == [4]


CHANGES: list[dict[str, Any]] = [
    {"tau": 2.0}, {"objective": "margin"}, {"cap": 0.0}, {"target": 3}, {"matching": "pooled"},
    {"matching": "sliced"}, {"penalty": 3.0}, {"penalty_norm": "image"}, {"reconstruction": 0.0},
    {"critic_steps": 1}, {"scales": 2}, {"width": 4}, {"amplitude": 0.5},
]  # fmt: skip


def test_every_option_changes_what_is_learned() -> None:
    x, y = pictures(4)

    def after(spec: IWDAGeneratorTrainer) -> Tensor:
        ctx = context(spec)
        for _ in range(2):  # the penalty is felt by the generator through the critic's next values
            play(spec, ctx, x, y)
        with torch.no_grad():
            return spec.write(ctx.modules, spec.levels(x), None)[-1]

    base = after(SPEC)
    for change in CHANGES:
        assert not torch.equal(after(IWDAGeneratorTrainer(**{**SMALL, **change})), base), change
    few, many = (after(IWDAGeneratorTrainer(**{**SMALL, "matching": "sliced", "projections": n})) for n in (4, 16))
    assert not torch.equal(few, many)
    two = IWDAGeneratorTrainer(**SMALL, scales=2)
    assert [level.shape[-1] for level in two.levels(x)] == [12, 16]
    other = IWDAGeneratorTrainer(**SMALL, scales=2, coarsest=14)
    assert [level.shape[-1] for level in other.levels(x)] == [14, 16]


def test_pictures_of_the_target_class_pay_nothing() -> None:
    y = pictures(4)[1]
    spec = IWDAGeneratorTrainer(**SMALL, target=int(y[0]), matching="sliced", tau=1.0)
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    loss = spec._adversarial(context(spec), logits, y)
    expected = [0.0 if y[i] == y[0] else float(-torch.log_softmax(logits[i], 0)[y[0]]) for i in range(4)]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_the_bound_attack_has_a_budget_of_its_own() -> None:
    x, y = pictures(6)
    weights = fresh(SPEC)
    free, held = (IWDAGenerator(samples=3, radius=r).with_weights(SPEC, weights, **SIZE) for r in (None, 0.01))
    result = free(victim(), x, untargeted(y), LINF)
    assert not ThreatModel("linf", 0.01).contains(result.x_adv, x).any()
    assert result.cost.queries.tolist() == [3] * 6 and result.cost.forwards.tolist() == [1] * 6
    assert free.passes(victim().views()["adaptive"], 6) == (0, 0, 18)
    assert str(free.budget(LINF)) == "IWD, no limit, 11x11 patches"
    kept = held(victim(), x, untargeted(y), LINF)
    assert kept.witness is not None and IWDBudget(0.01).contains(kept.x_adv, x, kept.witness).all()
    assert (kept.x_adv - x).abs().mean() < (result.x_adv - x).abs().mean()
    assert free.parameters()["matching"] == "conditional" and "generator" not in free.parameters()


def test_seeds_and_samples_decide() -> None:
    x, y = pictures(4)
    weights = fresh(SPEC)
    one, again, other = (
        IWDAGenerator(samples=1).with_weights(SPEC, weights, **SIZE)(victim(), x, untargeted(y), LINF, seed).x_adv
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_mistakes_are_named() -> None:
    x, y = pictures(2)
    bound = IWDAGenerator().with_weights(SPEC, fresh(SPEC), **SIZE)
    with pytest.raises(UserError, match="iwda_generator: a target must differ from the label"):
        bound(victim(), x, targeted(y, y), LINF)
    with pytest.raises(UserError, match="needs its weights"):
        IWDAGenerator()(victim(), x, untargeted(y), LINF)
    with pytest.raises(UserError, match="cannot use the weights of a GAPTrainer"):
        IWDAGenerator().with_weights(GAPTrainer(), {}, **SIZE)
    with pytest.raises(UserError, match="patches are 11x11, and the coarsest scale has 8 pixels"):
        SPEC.build((1, 8, 8), 10)
    with pytest.raises(UserError, match="no larger than the coarsest of 3 scales, 12 pixels"):
        IWDAGeneratorTrainer(scales=3).build((1, 12, 12), 10)
    with pytest.raises(UserError, match="target must lie in 0 to 9, and is 10"):
        IWDAGeneratorTrainer(target=10).build(SHAPE, 10)
