"""Defense-GAN: losses by hand, the descent, the random system and its views, and the attacks that break it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attack_toys import digits, linear_system, system, trained_network
from embedding_toys import LINF, SHAPE, Bench, batch, same, straight_and_resumed
from stepping import Probe
from torch import Tensor, nn
from training_toys import same as same_weights
from training_toys import weights

from casemate.attacks.gradient import PGD
from casemate.attacks.manifold import Manifold
from casemate.defenses.defense_gan import DefenseGAN
from casemate.errors import UserError
from casemate.networks.gan import ImageGenerator
from casemate.purification.projection import DefenseGANSystem, Descent, Projected
from casemate.randomised import drawn
from casemate.seeding import generator as seeded
from casemate.system import frozen
from casemate.threat import ThreatModel, untargeted


def small(**options: Any) -> DefenseGAN:
    return DefenseGAN(**{"latent": 3, "width": 2, "steps": 20, "restarts": 2, **options})


# --- training -----------------------------------------------------------------------------------------------


def test_who_moves_when() -> None:
    """The critic and the classifier at every batch, the generator after every fifth."""
    bench, (x, y) = Bench(small()), batch()
    names = ("classifier", "generator", "critic")
    seen = []
    for _ in range(10):
        before = {name: bench.part(name) for name in names}
        players = list(bench.stepping(x, y))
        seen.append([p for (p,) in players])
        assert {name for name in names if not same(before[name], bench.part(name))} == set(seen[-1])
    five = [["critic", "classifier"]] * 4 + [["critic", "generator", "classifier"]]
    assert seen == five * 2


def test_passes() -> None:
    bench, (x, y) = Bench(small(critic_steps=1)), batch()
    probes = {name: Probe(bench.modules[name]) for name in ("classifier", "generator", "critic")}
    with probes["classifier"], probes["generator"], probes["critic"]:
        bench.step(x, y)
    assert [len(probes[name].train) for name in probes] == [1, 2, 4]  # the critic: three, and one for the generator


@pytest.mark.parametrize("norm", ["sample", "rows"])
def test_the_critics_loss_by_hand(norm: Any) -> None:
    bench, (x, y) = Bench(small(penalty=7.0, penalty_norm=norm)), batch()
    critic, generator = (copy.deepcopy(bench.modules[name]) for name in ("critic", "generator"))
    losses = dict(bench.step(x, y))
    rng = seeded("step", 0)
    codes, share = torch.randn(2, 8, 3, generator=rng), torch.rand(8, 1, 1, 1, generator=rng)
    fake = generator(codes[0]).detach()
    between = (share * fake + (1 - share) * x).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between)
    squares = slope.square()
    norms = squares.sum((1, 2, 3)).sqrt() if norm == "sample" else squares.sum(2).sqrt()
    expected = critic(fake).mean() - critic(x).mean() + 7.0 * ((norms - 1) ** 2).mean()
    assert losses[("critic",)] == pytest.approx(expected.item(), rel=1e-4)


def test_the_generators_loss_by_hand() -> None:
    bench, (x, y) = Bench(small(critic_steps=1)), batch()
    stepping = bench.stepping(x, y)
    next(stepping)
    critic, generator = (copy.deepcopy(bench.modules[name]) for name in ("critic", "generator"))
    next(stepping)
    codes = torch.randn(2, 8, 3, generator=seeded("step", 0))
    assert float(bench.updates.pending[-1][2]) == pytest.approx(-critic(generator(codes[1])).mean().item(), rel=1e-5)


def test_the_gan_has_its_own_optimizer() -> None:
    bench = Bench(small(gan_lr=0.003))
    for name in ("generator", "critic"):
        (group,) = bench.players[name].optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.003, (0.5, 0.9), 0.0)
        assert bench.players[name].precision == "fp32"
        assert bench.players[name].schedule(0.99) == 1.0  # type: ignore[misc]
    assert bench.players["classifier"].optimizer.param_groups[0]["lr"] == 0.01


def test_classifiers_of_reconstructions() -> None:
    """From `reconstruct_from` on the GAN stands still, and the classifier sees images in the generator's range."""
    options: dict[str, Any] = {"classifier_on": "reconstruction", "reconstruct_from": 0.5, "critic_steps": 1}
    bench, (x, y) = Bench(small(**options, training_steps=6, training_restarts=2)), batch()
    with Probe(bench.f) as f:
        bench.step(x, y, fraction=0.4)
    assert torch.equal(f.inputs[0], x)
    before = bench.part("generator"), bench.part("critic")
    with Probe(bench.f) as f, Probe(bench.modules["generator"]) as g:
        assert [p for p, _ in bench.step(x, y, fraction=0.5)] == [("classifier",)]
    assert same(before[0], bench.part("generator")) and same(before[1], bench.part("critic"))
    assert len(g.train) == 7 and g.inputs[0].shape == (16, 3) and all(g.frozen)
    made = bench.modules["generator"](g.inputs[-1]).detach().view(8, 2, *SHAPE)
    best = (made - x[:, None]).square().flatten(2).mean(2).argmin(1)
    torch.testing.assert_close(f.inputs[0], made[torch.arange(8), best])
    bench = Bench(small(critic_steps=1))
    with Probe(bench.f) as f:
        bench.step(x, y, fraction=0.9)
    assert torch.equal(f.inputs[0], x)


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Any) -> None:
    straight, resumed = straight_and_resumed(small(critic_steps=3), tmp_path)
    for name in ("classifier", "generator", "critic"):
        assert same_weights(weights(resumed, name), weights(straight, name))


def test_the_classifier_learns_one_batch() -> None:
    bench, (x, y) = Bench(small()), batch()
    losses = [dict(bench.step(x, y))[("classifier",)] for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert bool((bench.f.eval()(x).argmax(1) == y).all())


def test_the_generator_learns_what_images_look_like() -> None:
    bench = Bench(small(width=8, gan_lr=0.003, critic_steps=2))
    image = torch.full(SHAPE, 0.1)
    image[:, :, 4:] = 0.9
    x, y, codes = image.repeat(8, 1, 1, 1), torch.arange(8) % 4, torch.randn(16, 3, generator=seeded("codes"))

    def error() -> float:
        return float((bench.modules["generator"](codes).detach() - image).square().mean())

    before = error()
    for _ in range(100):
        bench.step(x, y)
    assert before > 0.1 and error() < 0.5 * before


# --- the descent --------------------------------------------------------------------------------------------


class Line(nn.Module):
    """G(z) = z as a 1 x 1 x 2 image: every image is in its range."""

    latent = 2

    def forward(self, z: Tensor) -> Tensor:
        return z.view(-1, 1, 1, 2)


def test_the_descent_by_hand() -> None:
    """Two steps with momentum on the mean of two squares; a tenth of the rate from 0.8 of the steps on."""
    x, start = torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 2)
    z, v = 0.0, 0.0
    for step in range(5):
        v = 0.5 * v + (z - 1)  # d/dz of ((z - 1)^2 + 0) / 2
        z -= 0.3 * (0.1 if step >= 4 else 1) * v
    made, error = Descent(5, 1, 0.3, 0.5)(Line(), x, start)
    assert made.flatten().tolist() == pytest.approx([z, 0.0])
    assert error.item() == pytest.approx((z - 1) ** 2 / 2, rel=1e-4)
    assert not made.requires_grad


def test_more_restarts_are_never_worse_and_more_steps_are_better() -> None:
    torch.manual_seed(0)
    generator, x = ImageGenerator(SHAPE, latent=3, width=2), batch()[0]
    start = torch.randn(8, 6, 3)
    errors = [Descent(15, r, 10.0)(generator, x, start[:, :r])[1] for r in (1, 3, 6)]
    assert bool((errors[0] >= errors[1]).all()) and bool((errors[1] >= errors[2]).all())
    assert errors[2].sum() < errors[0].sum()
    assert Descent(60, 6, 10.0)(generator, x, start)[1].sum() < errors[2].sum()


def test_what_is_in_the_range_comes_back() -> None:
    torch.manual_seed(0)
    generator, z = ImageGenerator(SHAPE, latent=3, width=4), torch.randn(5, 3)
    x = generator(z).detach()
    made, error = Descent(20, 1)(generator, x, z[:, None])
    torch.testing.assert_close(made, x, rtol=0, atol=1e-5)
    assert float(error.detach().max()) < 1e-9


# --- the system ---------------------------------------------------------------------------------------------


@functools.cache
def generator_of_digits() -> ImageGenerator:
    """A decoder of digits, by an autoencoder."""
    torch.manual_seed(0)
    x, _ = digits()
    made = ImageGenerator((1, 8, 8), latent=8, width=4)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.Adam([*made.parameters(), *encoder.parameters()], 1e-2)
    for _ in range(200):
        rows = torch.randint(0, 1000, (64,))
        optimizer.zero_grad()
        codes = encoder(x[rows])
        (F.mse_loss(made(codes), x[rows]) + 1e-3 * codes.square().mean()).backward()
        optimizer.step()
    return made.eval().requires_grad_(False)


def guarded(**changes: Any) -> DefenseGANSystem:
    options: dict[str, Any] = {"attacked": Descent(10, 1), "draws": 2, "votes": 1, **changes}
    return DefenseGANSystem(
        trained_network(), generator_of_digits(), options.pop("descent", Descent(40, 2)), input_shape=(1, 8, 8),
        num_classes=10, **options,
    )  # fmt: skip


def test_answers_repeat_and_are_random_in_their_seed() -> None:
    x = digits()[0][1000:1012]
    one = guarded()
    assert one.stochastic and one.changes_inference and "purification" in one.offers
    with one.frozen(), torch.no_grad():
        assert torch.equal(one.logits(x), one.logits(x)) and torch.equal(one.decide(x), one.decide(x))
        assert not torch.equal(one.logits(x), guarded(seed=1).logits(x))
        alone = torch.cat([one.logits(x[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(alone, one.logits(x)[:5], rtol=1e-3, atol=1e-3)  # no image depends on another
    changes = ({}, {"descent": Descent(41, 2)}, {"attacked": Descent(9, 1)}, {"votes": 3}, {"seed": 1})
    assert len({guarded(**change).hash() for change in changes}) == len(changes)


def test_the_clean_images_survive_the_projection() -> None:
    x, y = digits()
    with torch.no_grad():
        assert (guarded().decide(x[1000:1100]) == y[1000:1100]).float().mean() > 0.6


def test_identity_gradients_are_those_of_the_classifier_at_the_reconstruction() -> None:
    x = digits()[0][:4].clone().requires_grad_()
    module = Projected(trained_network(), generator_of_digits(), Descent(10, 2))
    with frozen(module), drawn(module, "test"):
        made, error = module.reconstruct(x)
        logits = module(x)
        (through,) = torch.autograd.grad(logits[:, 0].sum(), x)
        made.requires_grad_()
        torch.testing.assert_close(logits, trained_network()(made))
        (at,) = torch.autograd.grad(trained_network()(made)[:, 0].sum(), made)
    torch.testing.assert_close(through, at)
    torch.testing.assert_close(error, (made - x).square().flatten(1).mean(1).detach())


def test_unrolled_gradients_against_finite_differences() -> None:
    f, g = copy.deepcopy(trained_network()).double(), copy.deepcopy(generator_of_digits()).double()
    module = Projected(f, g, Descent(4, 2, rate=1.0), "unrolled")
    x = digits()[0][:3].double().requires_grad_()
    direction = torch.randn(x.shape, generator=seeded("direction")).double()
    with frozen(module), drawn(module, "test"):
        (gradient,) = torch.autograd.grad(module(x)[:, 0].sum(), x)
        with torch.no_grad():
            ahead, behind = (module(x + s * 1e-6 * direction)[:, 0] for s in (1, -1))
    slopes = (gradient * direction).flatten(1).sum(1)
    assert float(slopes.abs().min()) > 1e-7
    torch.testing.assert_close(slopes, (ahead - behind) / 2e-6, rtol=1e-3, atol=1e-7)


def test_views() -> None:
    x = digits()[0][:6]
    one = guarded()
    views = one.views()
    assert list(views) == ["static", "adaptive", "unrolled"] and not any(v.exact for v in views.values())
    assert views["adaptive"].passes == (2, 2) and views["unrolled"].passes == (1, 1)
    with one.frozen(), torch.no_grad():
        torch.testing.assert_close(views["static"].logits(x), trained_network()(x))
        looks = [views[name].logits(x) for name in ("adaptive", "adaptive", "unrolled")]
        assert not torch.equal(looks[0], looks[1])  # every look has starts of its own
        with Probe(one.purification.generator) as g:
            views["adaptive"].logits(x)
    assert [len(seen) for seen in g.inputs] == [6] * 22  # two draws of ten steps and a look, one restart
    assert set(one.adaptive_attacks()) == {"manifold"}


def test_the_score_falls_with_the_reconstruction_error() -> None:
    x, one = digits()[0][:4], guarded()
    noise = (x + 0.5 * torch.rand(x.shape, generator=seeded("noise"))).clamp(0, 1)
    with drawn(one.classifier, "test"):
        clean, disturbed = one.purification.score(x), one.purification.score(noise)
        made = one.purification(x)
        torch.testing.assert_close(clean, (-(made - x).square().flatten(1).mean(1)).exp())
    assert bool((disturbed < clean).all())


# --- attacks ------------------------------------------------------------------------------------------------


def test_the_manifold_attack_finds_images_that_the_projection_keeps() -> None:
    x, y = digits()
    x, y, threat = x[1000:1010], y[1000:1010], ThreatModel("l2", 8.0)
    one = guarded()
    attack = Manifold(starts=2, inversion_steps=100, steps=120, rounds=3, kappa=2.0)
    result = attack(one, x, untargeted(y), threat)
    plain = system(trained_network(), (1, 8, 8), 10)
    right = plain.decide(x) == y
    assert bool((plain.decide(result.x_adv)[right] != y[right]).all())  # it fools the classifier everywhere
    assert result.success[right].float().mean() > 0.6
    # What it finds is in the generator's range: a descent from its own code gives it back.
    moved = (result.x_adv - x).flatten(1).norm(dim=1) > 0
    start = torch.randn(int(moved.sum()), 4, 8, generator=seeded("start"))
    error, clean_error = (Descent(200, 4)(generator_of_digits(), v[moved], start)[1] for v in (result.x_adv, x))
    assert error.median() < 0.5 * clean_error.median()
    assert (result.cost.forwards > 0).all() and (result.cost.forwards <= 3 * 120 + 1).all()


def test_a_nearer_success_is_kept_and_more_inversions_start_nearer() -> None:
    x, y = digits()
    x, y, one = x[1000:1006], y[1000:1006], guarded()
    near, far = (
        Manifold(starts=2, inversion_steps=60, steps=80, rounds=r)(
            one, x, untargeted(y), ThreatModel("l2", 64.0)
        ).x_adv
        for r in (4, 1)
    )
    found = [(v - x).flatten(1).norm(dim=1) for v in (near, far)]
    both = (found[0] > 0) & (found[1] > 0)
    assert both.any() and bool((found[0][both] <= found[1][both] + 1e-5).all())
    generator = generator_of_digits()
    errors = []
    for starts in (1, 4):
        z = Manifold(starts=starts, inversion_steps=40).invert(generator, x, seed=0)
        errors.append((generator(z) - x).square().flatten(1).sum(1))
    assert errors[1].sum() < errors[0].sum()


def test_the_manifold_attack_needs_a_generator() -> None:
    victim = linear_system(torch.eye(2))
    with pytest.raises(UserError, match="needs purification"):
        Manifold()(victim, torch.rand(1, 1, 1, 2), untargeted(torch.tensor([0])), LINF)


def test_attacks_on_both_faces_get_through() -> None:
    x, y = digits()
    x, goal = x[1000:1020], untargeted(y[1000:1020])
    one, threat, attack = guarded(), ThreatModel("linf", 0.25), PGD(steps=10)
    clean = (one.decide(x) != goal.labels).float().mean()
    for view in ("static", "adaptive"):
        assert attack(one, x, goal, threat, view=view).success.float().mean() > clean + 0.3


def test_modes() -> None:
    bench, (x, _) = (
        Bench(small(restarts=3, steps=7, rate=2.0, momentum=0.1, draws=4, votes=3, attacked_steps=5)),
        batch(),
    )
    made = {
        mode: bench.defense.system(bench.modules, mode, input_shape=SHAPE, num_classes=4, threat=LINF)
        for mode in bench.defense.inference_modes
    }
    assert list(made) == ["gan", "off"] and not made["off"].changes_inference
    gan = made["gan"]
    assert isinstance(gan, DefenseGANSystem)
    assert gan.purification.spec == {
        "purification": "defense_gan", "steps": 7, "restarts": 3, "rate": 2.0, "momentum": 0.1,
    }  # fmt: skip
    assert (gan.draws, gan.votes, gan.attacked.steps, gan.attacked.restarts) == (4, 3, 5, 2)
    with gan.frozen():
        assert gan.logits(x).shape == (8, 4)
    with pytest.raises(UserError, match="no inference mode 'of'"):
        bench.defense.system(bench.modules, "of", input_shape=SHAPE, num_classes=4, threat=LINF)
