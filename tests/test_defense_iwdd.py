"""IWDD: the signs of both losses, who moves when, passes, statistics, the ball, every option."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import training_toys
from embedding_toys import BreaksOff
from stepping import LINF, Bench, Probe, parameters, same, state, tracked
from torch import Tensor, nn
from training_toys import weights

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.iwdd import IWDD, Pair, distance, left_over, shifted, total
from casemate.defenses.iwdd_plus_pgd import IWDDPlusPGD
from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.networks.blocks import GlobalMean
from casemate.networks.patch_pyramid import resized
from casemate.objectives import cross_entropy
from casemate.seeding import generator
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Task

SIDE = 16
CRITIC, GENERATOR, CLASSIFIER = ("critic",), ("generator",), ("classifier",)


def small(**options: Any) -> IWDD:
    return IWDD(**{"width": 4, "scales": 2, "coarsest": 12, **options})


def network() -> Classifier:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    layers = {"conv": conv, "pool": GlobalMean()}
    return Classifier(input_shape=(1, SIDE, SIDE), num_classes=4, layers=layers, head=nn.Linear(6, 4))


def dense() -> Classifier:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU())
    return Classifier(input_shape=(1, SIDE, SIDE), num_classes=4, layers={"fc": hidden}, head=nn.Linear(32, 4))


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    """Images well inside [0, 1], whose class is a bright band, and labels."""
    y = torch.arange(n) % 4
    x = 0.3 + 0.2 * torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    for i, label in enumerate(y.tolist()):
        x[i, :, :, 4 * label : 4 * label + 3] += 0.3
    return x, y


def bench(method: IWDD, **options: Any) -> Bench:
    return Bench(method, **{"network": network, "lr": 0.01, **options})


# --- the algorithm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "weight"), [((3, 3), 10.0), ((2, 1), 0.0)])
def test_passes_and_running_statistics(steps: tuple[int, int], weight: float) -> None:
    critics, generators = steps
    made, (x, y) = bench(small(critic_steps=critics, generator_steps=generators, reconstruction=weight)), batch()
    g, f = made.modules["generator"].scales[0], made.modules["critic"].scales[1]  # type: ignore[index]
    with Probe(made.f) as h, Probe(g) as of_g, Probe(f) as of_f:
        updates = made.step(x, y, fraction=0.5)
    assert [players for players, _ in updates] == [CRITIC] * critics + [GENERATOR] * generators + [CLASSIFIER]
    assert [len(seen) // len(x) for seen in h.inputs] == [1] * generators + [2]  # 3 + 2 forwards, 3 to the input
    assert h.frozen == [True] * generators + [False] and h.train == [False] * generators + [True]
    assert h.backwards == generators + 1 and tracked(made.f) == 1
    rebuilt = generators if weight else 0
    assert len(of_g.train) == critics + generators + rebuilt + 1 == tracked(g)
    assert of_g.backwards == generators + rebuilt
    assert len(of_f.train) == 3 * critics + generators and all(of_f.train)
    assert tracked(f) == 3 * critics, "its statistics stand still while the generator learns"
    assert of_f.frozen == [False] * 3 * critics + [True] * generators


def test_who_moves_when() -> None:
    made, (x, y) = bench(small(critic_steps=2, generator_steps=1)), batch()
    before = {name: parameters(module) for name, module in made.modules.items()}
    for players, _ in made.updates(x, y, fraction=0.5):
        after = {name: parameters(module) for name, module in made.modules.items()}
        assert {name for name in after if not same(before[name], after[name])} == set(players)
        before = after


def played(method: IWDD, fraction: float = 0.5) -> tuple[Bench, dict[str, nn.Module], list[tuple[Any, float]]]:
    """A step of one critic and one generator update: (bench, the modules as they were, the losses)."""
    made, (x, y) = bench(method, lr=0.0), batch()
    for name in ("generator", "critic"):
        made.players[name].optimizer.param_groups[0]["lr"] = 0.0
    before = {name: copy.deepcopy(module).train() for name, module in made.modules.items()}
    return made, before, made.step(x, y, fraction=fraction)


def noise_of(rng: torch.Generator, real: list[Tensor], sizes: Tensor) -> list[Tensor]:
    drawn = [torch.randn(part.shape, generator=rng) for part in real]
    return [size * z for size, z in zip(sizes, drawn, strict=True)]


@pytest.mark.parametrize("norm", ["pixel", "image"])
@pytest.mark.parametrize("critic_norm", ["batch", "none"])
def test_the_critics_loss_by_hand(norm: Any, critic_norm: Any) -> None:
    method = small(critic_steps=1, generator_steps=1, penalty=3.0, penalty_norm=norm, critic_norm=critic_norm)
    _, before, losses = played(method)
    (x, _), g, f = batch(), before["generator"], before["critic"]
    real = g.pyramid(2 * x - 1)  # type: ignore[operator]
    rng = generator("step", 0)
    noise = noise_of(rng, real, 0.1 * left_over(real, real))
    share = torch.rand(8, generator=rng).view(-1, 1, 1, 1)
    expected = 0.0
    with torch.no_grad():
        made = g(real, noise)
    for critic, true, fake in zip(f.scales, real, made, strict=True):  # type: ignore[arg-type]
        expected += float((critic(fake).mean() - critic(true).mean()).detach())
        mixed = (share * true + (1 - share) * fake).requires_grad_()
        scores = critic(mixed)
        value = scores.sum() if norm == "pixel" else scores.flatten(1).mean(1).sum()
        (slope,) = torch.autograd.grad(value, mixed)
        norms = slope.abs() if norm == "pixel" else slope.square().sum((1, 2, 3)).sqrt()  # one channel
        expected += 3.0 * float(((norms - 1) ** 2).mean())
    assert dict(losses)[CRITIC] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau": 2.0, "ce_cap": 1.3},
        {"reconstruction": 0.0, "tau": 1.0},
        {"noise": "constant", "noise_factor": 0.4},
    ],
)
def test_the_generators_loss_by_hand(options: dict[str, Any]) -> None:
    method = small(critic_steps=1, generator_steps=1, **options)
    made_bench, before, losses = played(method)
    (x, y), g, f, h = batch(), before["generator"], before["critic"], before["classifier"].eval()
    real = g.pyramid(2 * x - 1)  # type: ignore[operator]
    constant = torch.full((2,), method.noise_factor)
    sizes = constant if method.noise == "constant" else method.noise_factor * left_over(real, real)
    rng = generator("step", 0)
    noise_of(rng, real, sizes)
    torch.rand(8, 1, 1, 1, generator=rng)
    with torch.no_grad():
        made = g(real, noise_of(rng, real, sizes))
        entropy = F.cross_entropy(h(((made[1] + 1) / 2).clamp(0, 1)), y, reduction="none")
        capped = entropy.clamp(max=method.ce_cap) if method.ce_cap else entropy
        value = -sum(float(critic(image).mean()) for critic, image in zip(f.scales, made, strict=True))  # type: ignore[arg-type]
        value -= method.tau * float(capped.mean())
        if method.reconstruction:
            fixed = made_bench.ctx.state["fixed"]
            again = g(real, [(sizes[0] * fixed).expand_as(real[0]), torch.zeros_like(real[1])])
            value += method.reconstruction * sum(
                float((a - b).square().mean()) for a, b in zip(again, real, strict=True)
            )
    assert dict(losses)[GENERATOR] == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert method.ce_cap is None or float(capped.mean()) < float(entropy.mean()), "the cap was felt"


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("joint", ["concat", "separate"])
def test_beta_weighs_the_clean_term(beta: float, joint: Any) -> None:
    method = small(critic_steps=1, generator_steps=1, beta=beta, bn_joint=joint)
    made, (x, y) = bench(method, lr=0.0), batch()
    h = copy.deepcopy(made.f).train()
    with Probe(made.f) as seen:
        losses = dict(made.step(x, y, fraction=0.5))
    x_adv = seen.inputs[-1][-8:]
    assert not torch.equal(x_adv, x)
    logits = h(torch.cat([x, x_adv])).split(8) if joint == "concat" else (h(x), h(x_adv))
    expected = beta * F.cross_entropy(logits[0], y) + F.cross_entropy(logits[1], y)
    assert losses[CLASSIFIER] == pytest.approx(expected.item(), rel=1e-5)
    assert tracked(made.f) == (1 if joint == "concat" else 2)
    assert same(state(made.f), state(h)), "running statistics saw both"


def gap(modules: dict[str, nn.Module], pair: Pair, noise: list[Tensor]) -> float:
    g, f = modules["generator"], modules["critic"]
    with torch.no_grad():
        return float(total(f(pair.real)) - total(f(g(pair.real, noise))))


def test_the_critic_widens_the_gap_that_the_generator_narrows() -> None:
    """What ascends with the penalty added, as printed, would run away: here it is subtracted."""
    made, (x, y) = bench(small(critic_steps=1, generator_steps=1, reconstruction=0.0, critic_norm="none")), batch()
    pair = Pair(made.defense, made.ctx, made.modules["generator"].pyramid(2 * x - 1))  # type: ignore[arg-type, operator]
    noise = pair.draw()

    def repeated(update: Any, count: int) -> None:
        (name,) = update().players
        player = made.players[name]
        for _ in range(count):
            player.optimizer.zero_grad()
            torch.autograd.backward(update().loss(), inputs=player.parameters)
            player.optimizer.step()

    start = gap(made.modules, pair, noise)
    repeated(pair.critic_update, 40)
    wide, slope = gap(made.modules, pair, noise), float(made.ctx.logs["patch_penalty"])
    repeated(lambda: pair.generator_update(x, y, 0.0), 40)
    assert wide > start + 0.01 and gap(made.modules, pair, noise) < wide
    assert slope < 2.0, "two scales, whose penalties begin at one each"


def test_tau_makes_images_that_the_classifier_gets_wrong() -> None:
    (x, y), entropies = batch(), []
    for tau in (0.0, 5.0):
        method = small(critic_steps=1, generator_steps=2, tau=tau, reconstruction=0.1, adversary_lr=0.005)
        made = bench(method, network=dense, lr=0.0)
        for _ in range(10):
            made.step(x, y, fraction=0.5)
        pair = Pair(method, made.ctx, made.modules["generator"].pyramid(2 * x - 1))  # type: ignore[operator]
        with torch.no_grad():
            images = pair.images(made.modules["generator"](pair.real, pair.draw()), x)
            entropies.append(float(F.cross_entropy(made.f(images), y)))
    assert entropies[1] > entropies[0] + 0.1


def test_labels_reach_the_pair_through_tau_alone() -> None:
    for tau, same_pair in ((0.0, True), (1.0, False)):
        found = []
        for roll in (0, 1):
            made, (x, y) = bench(small(tau=tau, critic_steps=1, generator_steps=2)), batch()
            made.step(x, y.roll(roll), fraction=0.5)
            found.append([state(made.modules[name]) for name in ("critic", "generator")])
        assert same(found[0][0], found[1][0]), "the critic is label-free"
        assert same(found[0][1], found[1][1]) == same_pair


def test_the_warm_up_leaves_the_classifier_to_clean_images() -> None:
    made, (x, y) = bench(small(warmup=0.2, critic_steps=1, generator_steps=1)), batch()
    h = copy.deepcopy(made.f).train()
    with Probe(made.f) as seen:
        updates = made.step(x, y, fraction=0.19)
    assert len(seen.inputs) == 1 and torch.equal(seen.inputs[0], x), "and the generator does not attack it"
    assert [players for players, _ in updates] == [CRITIC, GENERATOR, CLASSIFIER]
    assert dict(updates)[CLASSIFIER] == pytest.approx(F.cross_entropy(h(x), y).item(), rel=1e-6)
    with Probe(made.f) as seen:
        made.step(x, y, fraction=0.2)
    assert len(seen.inputs) == 2


def test_it_learns_one_batch() -> None:
    method = small(critic_steps=1, generator_steps=1, warmup=0.0, scales=1)
    made = bench(method, network=dense, optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.05))
    x, y = batch()
    losses = [dict(made.step(x, y, fraction=0.5))[CLASSIFIER] for _ in range(25)]
    assert losses[-1] < losses[0] / 3
    assert bool((made.f(x).argmax(1) == y).all())
    assert float(made.ctx.logs["reconstruction"]) < 0.5


# --- noise, scales, optimisers --------------------------------------------------------------------------------


def test_noise_is_as_large_as_what_the_coarser_scales_leave() -> None:
    x = torch.zeros(1, 1, 4, 4)
    x[..., 2:] = 1.0
    coarse = F.avg_pool2d(x, 2)
    by_hand = torch.stack([torch.tensor(0.5), (x - resized(coarse, (4, 4))).square().mean().sqrt()])
    torch.testing.assert_close(left_over([coarse, x], [coarse, x]), by_hand)
    made, (images, y) = bench(small(critic_steps=1, generator_steps=1)), batch()
    made.step(images, y)
    pair = Pair(made.defense, made.ctx, made.modules["generator"].pyramid(2 * images - 1))  # type: ignore[arg-type, operator]
    made.ctx.state["left"] = torch.tensor([0.0, 30.0])  # what the next draw goes by
    assert [float(z.std()) for z in pair.draw()] == [0.0, pytest.approx(3.0, rel=0.05)]


def test_the_reconstruction_sets_the_next_steps_noise() -> None:
    made, (x, y) = bench(small(critic_steps=1, generator_steps=1)), batch()
    real = made.modules["generator"].pyramid(2 * x - 1)  # type: ignore[operator]
    made.step(x, y)
    left = made.ctx.state["left"]
    assert left.shape == (2,) and float(left[0]) == pytest.approx(float(left_over(real, real)[0]))
    assert float(left[1]) != pytest.approx(float(left_over(real, real)[1])), "a new generator is no perfect one"
    fixed = made.ctx.state["fixed"].clone()
    made.step(x, y)
    assert torch.equal(made.ctx.state["fixed"], fixed)
    constant = bench(small(noise="constant", critic_steps=1, generator_steps=1))
    constant.step(x, y)
    assert list(constant.ctx.state) == ["fixed"]


def test_different_noise_gives_different_images_near_theirs() -> None:
    made, (x, y) = bench(small(reconstruction=100.0, adversary_lr=0.003, generator_steps=2)), batch()
    for _ in range(15):
        made.step(x, y)
    pair = Pair(made.defense, made.ctx, made.modules["generator"].pyramid(2 * x - 1))  # type: ignore[arg-type, operator]
    with torch.no_grad():
        one, other = (pair.images(made.modules["generator"](pair.real, pair.draw()), x) for _ in range(2))
    assert not torch.equal(one, other) and one.min() >= 0 and one.max() <= 1
    assert float((one - x).abs().mean()) < 0.5 * float((x.flip(0) - x).abs().mean())


def test_a_larger_image_is_scaled_up_from_the_finest_scale() -> None:
    made, (x, y) = bench(small(scales=1, largest=13, coarsest=11)), batch()
    assert made.modules["generator"].sizes == ((13, 13),)
    with Probe(made.f) as seen:
        made.step(x, y, fraction=0.5)
    assert seen.inputs[-1].shape == (16, 1, SIDE, SIDE)


def test_players_and_published_settings() -> None:
    made = bench(small())
    for name, precision in (("generator", "auto"), ("critic", "fp32")):
        (group,) = made.players[name].optimizer.param_groups
        assert (group["lr"], group["betas"]) == (0.0005, (0.5, 0.999)) and made.players[name].precision == precision
    assert bench(small(adversary_lr=0.1)).players["critic"].optimizer.param_groups[0]["lr"] == 0.1
    paper = IWDD()
    assert (paper.tau, paper.beta, paper.critic_steps, paper.generator_steps) == (0.1, 0.1, 3, 3)
    task = Task((3, 64, 64), 10, LINF, network, lambda parameters, **changes: None)  # type: ignore[arg-type, return-value]
    assert paper.modules(task)["generator"].sizes == ((25, 25), (40, 40), (64, 64))
    with pytest.raises(UserError, match="patches are 11x11"):
        IWDD().modules(Task((1, 8, 8), 10, LINF, network, lambda parameters, **changes: None))  # type: ignore[arg-type, return-value]


# --- the ball, and the linf adversary -------------------------------------------------------------------------


def test_the_sliced_distance_of_a_shift_in_brightness_and_of_a_permutation() -> None:
    rng = generator("directions")
    directions = F.normalize(torch.randn(20, 2 * 7 * 7, generator=rng)).view(20, 2, 7, 7)
    x = torch.rand(3, 2, 12, 12, generator=rng)
    assert not distance(x, x, directions).any()
    brighter = 0.2 * directions.sum((1, 2, 3)).abs().mean()
    torch.testing.assert_close(distance(x, x + 0.2, directions), brighter.expand(3), rtol=1e-4, atol=1e-6)
    tile = torch.rand(1, 2, 12, 7, generator=rng).repeat(1, 1, 1, 3)  # period 7: shifting permutes the patches
    torch.testing.assert_close(
        distance(tile[..., :13], tile[..., 3:16], directions), torch.zeros(1), atol=1e-6, rtol=0
    )
    assert bool((distance(x, x.flip(0), directions)[[0, 2]] > 0.001).all())


def test_images_outside_the_ball_fall_back() -> None:
    x, y = batch()
    seen = {}
    for eps in (1e-9, 1e3, "augment"):
        made = bench(small(critic_steps=1, generator_steps=1, iwd_eps=eps))
        with Probe(made.f) as probe:
            made.step(x, y, fraction=0.5)
        back = (probe.inputs[-1][8:] == x).flatten(1).all(1)
        seen[eps] = back.float().mean().item()
        assert float(made.ctx.logs["rejected"]) == pytest.approx(seen[eps], abs=1e-6)
    assert seen[1e-9] == 1.0 and seen[1e3] == 0.0


def test_an_augmented_image_is_usually_inside_and_another_is_not() -> None:
    method, made, (x, _) = small(iwd_eps="augment"), bench(small()), batch(32)
    rng = generator("augment")
    near = shifted(x, rng)
    assert near.shape == x.shape and not torch.equal(near, x)
    made.ctx.rng = rng
    kept = [
        (method._kept(made.ctx, images, x) != x).flatten(1).any(1).float().mean().item()
        for images in (near, torch.ones_like(x))
    ]
    assert kept[0] > 0.6 and kept[1] < 0.1


def test_shifts_are_crops_from_a_frame_of_zeros_and_flips() -> None:
    x = torch.arange(1.0, 1 + 2 * 64).view(2, 1, 8, 8)
    for seed in range(8):
        out = shifted(x, generator("shift", seed))
        for image, original in zip(out, x, strict=True):
            padded = F.pad(original, (1, 1, 1, 1))
            crops = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
            assert any(torch.equal(image, c) or torch.equal(image, c.flip(2)) for c in crops)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_half_of_the_batch_may_be_projected_gradient_ascent(norm: Any) -> None:
    threat = ThreatModel(norm, 0.05 if norm == "linf" else 0.5)
    method = IWDDPlusPGD(width=4, scales=1, critic_steps=1, generator_steps=1, steps=4)
    made, (x, y) = bench(method, threat=threat), batch()
    with Probe(made.f) as seen:
        made.step(x, y, fraction=0.5)
    assert [len(images) for images in seen.inputs] == [8, 4, 4, 4, 4, 16]
    assert seen.frozen == [True] * 5 + [False] and seen.train == [False] * 5 + [True]
    x_adv = seen.inputs[-1][8:]
    inside = threat.contains(x_adv, x)
    assert bool(inside[:4].all()) and not bool(inside[4:].any())
    assert tracked(made.f) == 1


def test_ascent_raises_the_loss() -> None:
    made, (x, y) = bench(small(pgd_share=1.0, critic_steps=1, generator_steps=1), network=dense), batch()
    h = copy.deepcopy(made.f)
    with Probe(made.f) as seen:
        made.step(x, y, fraction=0.5)
    x_adv = seen.inputs[-1][8:]
    before, after = (cross_entropy(h(images), untargeted(y)).mean().item() for images in (x, x_adv))
    assert after > before + 0.1 and bool(LINF.contains(x_adv, x).all())


# --- resuming -------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Any) -> None:
    method = small(critic_steps=1, generator_steps=1, width=2, warmup=0.2)
    x, y = batch(20)
    samples = DeviceData(Images((255 * x).byte().permute(0, 2, 3, 1).contiguous().numpy(), y.numpy()))
    made = training_toys.recipe(epochs=3, optimizer="adam", lr=0.01)
    task = Task((1, SIDE, SIDE), 4, LINF, network, made.player)
    straight = training_toys.run(method, made, task=task, samples=samples)
    with pytest.raises(InterruptedError):
        training_toys.run(method, made, task=task, samples=samples, checkpoints=tmp_path, recorder=BreaksOff())
    resumed = training_toys.run(method, made, task=task, samples=samples, checkpoints=tmp_path)
    for name in ("classifier", "generator", "critic"):
        assert training_toys.same(weights(resumed, name), weights(straight, name))
    assert resumed.curves == straight.curves
