"""L2L and L2L-DA: the recursion in closed form, its gradient, every switch, exact passes, a fit by the loop."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_toys import Counter, digits, system, trained_network
from learned_toys import LINF, SHAPE, context, fit, fresh, strike
from torch import Tensor, nn

from casemate.attacks.l2l import L2L, L2LDA, L2LDATrainer, L2LTrainer, Path, Recursive
from casemate.attacks.learned import LearnedAttack, NeedsWeights, slope
from casemate.errors import UserError
from casemate.networks.base import count_parameters
from casemate.threat import ThreatModel, untargeted

SMALL = ThreatModel("linf", 0.08)
DA = L2LDATrainer(width=4, steps=4)
SPECS: list[tuple[NeedsWeights, LearnedAttack]] = [
    (L2L(), L2LTrainer(width=8)),
    (L2L(), L2LTrainer(width=8, steps=2)),
    (L2LDA(), DA),
]
NAMES = ["grad_l2l", "2_step_l2l", "l2l_da"]


@functools.cache
def fitted(which: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    if which == 2:
        return fit(DA, images=1000, epochs=3, lr=1e-2)
    return fit(SPECS[which][1], epochs=3)


class Ones(nn.Module):
    """A generator that always says the same."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return torch.full_like(x[:, :1], self.value)


def path_of(spec: Recursive, n: int = 5, radius_off: float = 0.0) -> Path:
    x, y = (part[:n] for part in digits())
    gradient = slope(trained_network(), x, untargeted(y))[2]
    return spec.begin(x, gradient, y, torch.randn(n, spec.noise))


# --- the recursion --------------------------------------------------------------------------------------------


def test_a_silent_generator_leaves_the_image_and_a_loud_one_reaches_the_radius_in_four_steps() -> None:
    """Oracle 14."""
    silent = DA.build(**SHAPE)
    nn.init.zeros_(silent["generator"].head.weight)  # type: ignore[arg-type,union-attr]
    path = path_of(DA)
    with torch.no_grad():
        for _ in range(4):
            path = DA.advance(silent, path, LINF)
    assert not path.delta.any()
    path = path_of(DA)
    for step in range(6):
        path = DA.advance({"generator": Ones()}, path, LINF)
        assert torch.allclose(path.delta, torch.full_like(path.x, min(0.3, 0.075 * (step + 1))))
        assert LINF.contains(path.image(), path.x).all()


@pytest.mark.parametrize("which", [0, 1, 2], ids=NAMES)
def test_one_look_per_step_gives_the_whole_gradient(which: int) -> None:
    """The rollout never differentiates the victim twice; autograd through it all must agree."""
    spec: Any = SPECS[which][1]
    torch.manual_seed(0)
    modules = spec.build(**SHAPE)
    modules["generator"].eval()
    path, generator = path_of(spec), modules["generator"]
    parameters = [p for p in generator.parameters() if p.requires_grad]
    goal = untargeted(path.labels)

    total = torch.zeros(())
    for _, _, values in spec.rollout(modules, trained_network(), path, goal, LINF):
        total = total + values.sum()
    mine = torch.autograd.grad(total, parameters, allow_unused=True)

    naive, at = torch.zeros(()), path
    for _ in range(spec.steps):
        at = spec.advance(modules, at, LINF)
        naive = naive + F.cross_entropy(trained_network()(at.image()), path.labels, reduction="sum")
        at = replace(at, gradient=slope(trained_network(), at.image(), goal)[2])
    theirs = torch.autograd.grad(naive, parameters, allow_unused=True)
    assert float(total.detach()) == pytest.approx(float(naive.detach()), rel=1e-6)
    assert any(g is not None and g.abs().max() > 1e-4 for g in mine)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_two_steps_of_l2l_are_the_clipped_sum_of_two_calls() -> None:
    spec: Any = SPECS[1][1]
    torch.manual_seed(0)
    modules = spec.build(**SHAPE)
    net = modules["generator"].eval()
    path, goal = path_of(spec), untargeted(digits()[1][:5])

    def call(x: Tensor) -> Tensor:
        gradient = slope(trained_network(), x, goal)[2]
        return 0.3 * net(torch.cat([x, gradient / gradient.abs().amax((1, 2, 3), keepdim=True)], 1))

    with torch.no_grad():
        first = call(path.x)
        second = call((path.x + first).clamp(0, 1))
        expected = (path.x + (first + second).clamp(-0.3, 0.3)).clamp(0, 1)
        *_, (x_adv, _, _) = spec.rollout(modules, trained_network(), path, goal, LINF)
    assert torch.allclose(x_adv, expected, atol=1e-6)


# --- the switches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "channel", "image", "none"])
def test_gradients_are_normalised_as_asked_and_nothing_stays_nothing(norm: Any) -> None:
    torch.manual_seed(0)
    gradient = torch.cat([torch.randn(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), 1e-35 * torch.randn(1, 3, 4, 4)])
    gradient[0, 1] = 0
    seen = L2LDATrainer(gradient_norm=norm).normalised(gradient)
    assert seen.isfinite().all() and not seen[1].any()
    if norm == "none":
        assert torch.equal(seen, gradient * 0.01)
    elif norm == "rms":
        assert seen.flatten(1).square().mean(1).sqrt().tolist() == pytest.approx([1, 0, 1], abs=1e-5)
    elif norm == "image":
        assert seen.flatten(1).norm(dim=1).tolist() == pytest.approx([1, 0, 1], abs=1e-5)
    else:
        assert seen.flatten(2).norm(dim=2)[0].tolist() == pytest.approx([1, 0, 1], abs=1e-5)
        assert seen.flatten(2).norm(dim=2)[2].tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_its_reading_of_l2l_is_a_setting() -> None:
    spec = L2LDATrainer(
        steps=1, step_factor=1.0, width=64, z_dim=0, condition=False, feed_delta=False, gradient_norm="none",
        diversity=0.0,
    )  # fmt: skip
    made = spec.build((3, 32, 32), 10)
    assert count_parameters(made["generator"]) == 466_048
    full = L2LDATrainer(width=64).build((3, 32, 32), 10)
    assert count_parameters(full["generator"]) == 500_944
    assert count_parameters(L2LDATrainer(width=64).build((1, 28, 28), 10)["generator"]) == 495_184


def losses(x: Tensor, y: Tensor, **changes: Any) -> tuple[float, float]:
    spec = L2LDATrainer(**({"width": 4, "steps": 3} | changes))
    ctx = context(spec)
    (update,) = spec.step(ctx, x, y)
    return float(update.loss().detach()), float(ctx.logs.get("apart", torch.tensor(0.0)))


def test_the_loss_is_cross_entropy_and_diversity_of_every_step_or_the_last() -> None:
    x, y = (part[:12] for part in digits())
    plain, apart = losses(x, y, diversity=0.0)
    diverse, _ = losses(x, y, diversity=0.5)
    assert apart > 0 and diverse < plain
    last, _ = losses(x, y, diversity=0.5, diversity_at="last")
    assert last == pytest.approx(plain - 0.5 * apart, rel=1e-5)
    assert losses(x, y, diversity=0.5, over_steps="mean")[0] == pytest.approx(diverse / 3, rel=1e-5)
    assert plain < losses(x, y, diversity=0.0, loss_at="last")[0] < 0
    weight = 64 / 8  # pixels over numbers of noise
    summed, total = losses(x, y, diversity=0.5, diversity_norm="sum")
    assert total == pytest.approx(weight * apart, rel=1e-4)
    assert plain - summed == pytest.approx(weight * (plain - diverse), rel=1e-3)
    assert losses(x, y, diversity=0.5, z_dim=0)[1] == 0


def test_diversity_is_the_ratio_of_both_distances() -> None:
    images = torch.zeros(4, 1, 2, 2)
    images[2], images[3] = 0.2, 0.1
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 3.0], [1.0, 0.0]])
    assert float(DA.apart(images, z)) == pytest.approx((0.2 / 2 + 0.1 / 0.5) / 2)
    assert float(DA.apart(torch.ones(4, 1, 2, 2), z)) == 0
    summed = L2LDATrainer(diversity_norm="sum")
    assert float(summed.apart(images, z)) == pytest.approx((0.8 / 4 + 0.4 / 1) / 2)


@pytest.mark.parametrize(
    "changes", [{"condition": False}, {"feed_delta": False}, {"z_dim": 0}, {"steps": 1, "step_factor": 1.0}]
)
def test_every_ablation_takes_a_step_and_attacks(changes: dict[str, Any]) -> None:
    spec = L2LDATrainer(**({"width": 4, "steps": 2} | changes))
    ctx = context(spec)
    x, y = (part[:16] for part in digits())
    (update,) = spec.step(ctx, x, y)
    parameters = list(ctx.modules["generator"].parameters())
    torch.autograd.backward(update.loss(), inputs=parameters)
    assert sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None) > 0
    assert all(p.grad is None for p in trained_network().parameters())
    done = strike(L2LDA(draws=3), spec, fresh(spec), threat=SMALL, rows=slice(1500, 1520))
    assert SMALL.contains(done.x_adv, digits()[0][1500:1520]).all()


def test_a_victim_without_a_slope_breaks_nothing() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (0 * x.flatten(1)).sum(1, keepdim=True) + torch.arange(10.0)

    x, y = (part[:8] for part in digits())
    for _, spec in SPECS:
        ctx = context(spec, Flat())
        (update,) = spec.step(ctx, x, y)
        assert update.loss().isfinite()


# --- fits, and what they cost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2], ids=NAMES)
def test_the_loop_fits_it_until_little_stands(which: int) -> None:
    attack, spec = SPECS[which]
    before = {k: v.clone() for k, v in trained_network().state_dict().items()}
    weights, curves = fitted(which)
    assert all(torch.equal(v, before[k]) for k, v in trained_network().state_dict().items())
    assert curves[-1]["fooled"] > 0.75 > curves[0]["fooled"]
    assert strike(attack, spec, weights).success.float().mean() > 0.9
    assert strike(attack, spec, fresh(spec)).success.float().mean() < 0.7


@pytest.mark.parametrize("which", [0, 1, 2], ids=NAMES)
def test_every_pass_is_counted_and_the_bound_is_met_by_images_that_stand(which: int) -> None:
    attack, spec = SPECS[which]
    looks, queries = [(1, 0), (2, 0), (1 + 10 * 3, 9)][which]
    counter = Counter(trained_network())
    victim = system(counter, (1, 8, 8), 10)
    done = strike(attack, spec, fitted(which)[0], victim, SMALL)
    assert sum(counter.forwards) == int(done.cost.forwards.sum() + done.cost.queries.sum())
    assert sum(counter.gradients) == int(done.cost.backwards.sum())
    stands, n = ~done.success, len(done.success)
    assert 0 < stands.sum() < n
    assert (done.cost.forwards[stands] == looks + 1).all() and (done.cost.queries[stands] == queries).all()
    bound = attack.with_weights(spec, fitted(which)[0], **SHAPE).passes(victim.views()["adaptive"], n)
    assert bound == (n * looks, n * looks, n * queries)


def test_the_worst_of_ten_noises_counts_and_so_does_the_way_there() -> None:
    weights = fitted(2)[0]
    one, ten = (strike(L2LDA(draws=d, keep="last"), DA, weights, threat=SMALL).success for d in (1, 10))
    best = strike(L2LDA(draws=10), DA, weights, threat=SMALL).success
    assert (ten | ~one).all() and best.sum() >= ten.sum() >= one.sum()
    assert (best | ~ten).float().mean() > 0.99
    same = [strike(L2LDA(draws=1, keep="last"), DA, weights, threat=SMALL, seed=s).x_adv for s in (3, 3, 4)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_an_image_does_not_feel_its_batch() -> None:
    for which in (1, 2):
        attack, spec = SPECS[which]
        x, y = (part[1500:1520].clone() for part in digits())
        victim = system(trained_network(), (1, 8, 8), 10)
        bound = attack.with_weights(spec, fitted(which)[0], **SHAPE)
        before = bound(victim, x, untargeted(y), SMALL)
        others = torch.arange(20) != 11
        x[others], y[others] = digits()[0][:19], digits()[1][:19]
        after = bound(victim, x, untargeted(y), SMALL)
        assert torch.allclose(before.x_adv[11], after.x_adv[11], atol=1e-5)


def test_sizes_that_do_not_halve_are_refused() -> None:
    with pytest.raises(UserError, match="multiples of 2, not 1x7x8"):
        L2LTrainer().build((1, 7, 8), 10)
    assert L2LTrainer(network="wide", width=4).build((1, 7, 8), 10)
    with pytest.raises(UserError, match="multiples of 4, not 1x10x8"):
        L2LDATrainer().build((1, 10, 8), 10)


def test_clips_its_gradient_and_takes_the_recipes_optimizer() -> None:
    seen: dict[str, Any] = {}

    class Probe:
        def player(self, parameters: Any, **changes: Any) -> str:
            seen.update(changes)
            return "player"

    modules = DA.build(**SHAPE)
    assert DA.players(Probe(), modules) == {"generator": "player"}  # type: ignore[arg-type, comparison-overlap]
    assert seen == {"max_grad_norm": 1.0}
