"""Random self-ensembles: where the noise is, that it never stops, and what the system answers and shows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import (
    LINF,
    Bench,
    Probe,
    batch,
    linear_network,
    moved,
    normed_network,
    parameters,
    same,
    state,
    tracked,
)
from torch import nn
from training_toys import recipe, run, weights
from training_toys import same as equal

from casemate.attacks.gradient import PGD
from casemate.defenses.rse import RSE
from casemate.errors import UserError
from casemate.evaluation.plan import not_evaluated
from casemate.networks.base import Classifier, Normalise, build_network
from casemate.randomised import GaussianNoise, RandomisedSystem, noise_layers
from casemate.seeding import generator
from casemate.threat import untargeted


def two_layers() -> Classifier:
    """Two convolutions, the second in a block of its own."""
    torch.manual_seed(0)
    layers = {
        "stem": nn.Conv2d(1, 4, 3, padding=1),
        "block": nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, stride=3), nn.ReLU()),
        "flat": nn.Flatten(),
    }
    return Classifier(
        input_shape=(1, 6, 6), num_classes=4, layers=layers, head=nn.Linear(16, 4),
        normalise=Normalise([0.5], [0.25]),
    )  # fmt: skip


def system(bench: Bench) -> RandomisedSystem:
    made = bench.defense.system(bench.modules, "ensemble", input_shape=(1, 6, 6), num_classes=4, threat=LINF)
    assert isinstance(made, RandomisedSystem)
    return made


# --- where the noise is -------------------------------------------------------------------------------------


def sigmas(module: nn.Module) -> list[float]:
    return [layer.sigma for layer in noise_layers(module)]


def test_noise_stands_before_every_convolution() -> None:
    f = Bench(RSE(sigma_input=0.3, sigma_inner=0.05), two_layers).f
    assert isinstance(f.normalise, nn.Sequential) and sigmas(f.normalise[0]) == [0.3]
    assert isinstance(f.normalise[1], Normalise), "the image's noise is in pixel units"
    assert isinstance(f.body["stem"], nn.Conv2d)
    noise, conv = f.body["block"][1]  # type: ignore[index]
    assert isinstance(noise, GaussianNoise) and noise.sigma == 0.05 and isinstance(conv, nn.Conv2d)
    assert sigmas(f) == [0.3, 0.05]


def test_noise_may_stand_behind_every_convolution() -> None:
    f = Bench(RSE(sigma_input=0.8, sigma_inner=0.4, position="after"), two_layers).f
    assert sigmas(f) == [0.8, 0.4, 0.4]
    for pair in (f.body["stem"], f.body["block"][1]):  # type: ignore[index]
        assert isinstance(pair, nn.Sequential)
        assert isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], GaussianNoise)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [("wrn", {"depth": 10, "width": 1}, (3, 32, 32)), ("preact_resnet18", {}, (3, 32, 32)),
     ("compact_resnet", {}, (3, 16, 16)), ("lenet5", {}, (1, 28, 28))],
)  # fmt: skip
def test_every_convolution_of_a_real_network_has_its_noise(name: str, options: Any, shape: Any) -> None:
    f = build_network(name, input_shape=shape, num_classes=10, **options)
    convolutions = [m for m in f.modules() if isinstance(m, nn.Conv2d)]
    plain = copy.deepcopy(f).eval()
    RSE(sigma_input=0.0, sigma_inner=0.0).add_noise(f)
    assert len(noise_layers(f)) == len(convolutions)
    assert [m for m in f.modules() if isinstance(m, nn.Conv2d)] == convolutions
    x = torch.rand(2, *shape)
    torch.testing.assert_close(f.eval()(x), plain(x))


def test_noise_stays_on_in_eval_mode_for_each_image_its_own() -> None:
    f = Bench(RSE(), two_layers).f.eval()
    x = batch(1)[0].repeat(2, 1, 1, 1)
    one, other = f(x), f(x)
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])


def test_the_noise_has_the_size_that_was_asked_for() -> None:
    bench = Bench(RSE(sigma_input=0.5, sigma_inner=0.05), lambda: linear_network([[1.0, 0.0], [0.0, 1.0]]))
    out = bench.f(torch.full((4000, 1, 1, 2), 0.25)).detach()
    assert float(out.std()) == pytest.approx(0.5, rel=0.05) and float(out.mean()) == pytest.approx(0.25, abs=0.03)


# --- training -----------------------------------------------------------------------------------------------


def test_a_step_is_one_noisy_forward_and_one_backward() -> None:
    bench, (x, y) = Bench(RSE()), batch()
    before, old = parameters(bench.f), copy.deepcopy(bench.f).train()
    with Probe(bench.f) as passes:
        torch.manual_seed(3)
        ((players, loss),) = bench.step(x, y)
    assert players == ("classifier",)
    assert (passes.train, passes.frozen, passes.backwards) == ([True], [False], 1)
    assert torch.equal(passes.inputs[0], x) and tracked(bench.f) == 1
    assert moved(before, bench.f)
    torch.manual_seed(3)
    assert loss == pytest.approx(F.cross_entropy(old(x), y).item(), rel=1e-6)
    assert loss != pytest.approx(F.cross_entropy(old(x), y).item(), rel=1e-6)


def test_without_noise_it_is_standard_training() -> None:
    bench, (x, y) = Bench(RSE(sigma_input=0.0, sigma_inner=0.0), normed_network), batch()
    plain = normed_network().train()
    ((_, loss),) = bench.step(x, y)
    assert loss == pytest.approx(F.cross_entropy(plain(x), y).item(), rel=1e-6)


def test_it_learns_one_batch() -> None:
    defense, (x, y) = RSE(sigma_input=0.05, sigma_inner=0.05), batch()
    bench = Bench(defense, two_layers, lr=0.01, optimizer=torch.optim.Adam)
    losses = [bench.step(x, y)[0][1] for _ in range(150)]
    assert sum(losses[-5:]) < losses[0]
    made = system(bench)
    with made.frozen():
        assert bool((made.decide(x) == y).all())


def test_a_seed_repeats_a_run_and_a_checkpoint_continues_it(tmp_path: Path) -> None:
    def net() -> Classifier:
        layers = {"conv": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten())}
        return Classifier(input_shape=(1, 4, 4), num_classes=3, layers=layers, head=nn.Linear(64, 3))

    class Died(Exception):
        pass

    def die(_: object) -> None:
        raise Died

    made = recipe(epochs=2)
    straight = run(RSE(), made, network=net)
    with pytest.raises(Died):
        run(RSE(), made, network=net, checkpoints=tmp_path, save=die)
    slots = sorted(tmp_path.rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(slots) == 2
    slots[-1].unlink()  # what is left is the checkpoint after the first epoch
    resumed = run(RSE(), made, network=net, checkpoints=tmp_path)
    assert equal(weights(resumed), weights(straight))
    assert not equal(weights(run(RSE(), made, network=net, seed=1)), weights(straight))


# --- inference ----------------------------------------------------------------------------------------------


def test_the_answer_is_the_mean_softmax_of_the_draws() -> None:
    bench = Bench(RSE(sigma_input=0.4, ensemble=3), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
    made = bench.defense.system(bench.modules, "ensemble", input_shape=(1, 1, 2), num_classes=2, threat=LINF)
    x, chances = torch.tensor([[0.5, 0.4], [0.1, 0.9]]), torch.zeros(2, 2)
    for k in range(3):
        noise = torch.randn((1, 1, 1, 2), generator=generator("noise", 0, "answer", 0, k, 0)).view(1, 2)
        chances += ((x + 0.4 * noise) @ torch.tensor([[1.0, -2.0], [0.0, 1.0]]).T).softmax(1) / 3
    torch.testing.assert_close(made.logits(x.view(2, 1, 1, 2)), chances.log())


def test_the_system_is_randomised_and_attacked_through_the_mean_of_its_draws() -> None:
    bench, (x, y) = Bench(RSE(ensemble=2, draws=6, votes=3)), batch()
    bench.step(x, y)
    made = system(bench)
    assert made.stochastic and made.changes_inference and not_evaluated(made) is None
    assert (made.ensemble, made.draws, made.votes) == (2, 6, 3)
    assert made.views()["adaptive"].passes == (6, 6) and not made.views()["adaptive"].exact
    assert made.decision_passes() == (6, 0)
    kept = state(bench.f)
    cost = PGD(steps=2)(made, x, untargeted(y), LINF).cost
    assert cost.forwards.tolist() == [2 * 6 + 2 * 3] * 8
    assert same(kept, state(bench.f)), "evaluation moves no running statistic"


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = RSE()
    assert (chosen.sigma_input, chosen.sigma_inner, chosen.position) == (0.2, 0.1, "before")
    assert (chosen.ensemble, chosen.draws, chosen.votes) == (10, 20, 1)


def test_one_vote_is_the_papers_answer() -> None:
    bench, (x, _) = Bench(RSE(ensemble=4)), batch()
    made = system(bench)
    with made.frozen():
        assert torch.equal(made.decide(x), made.logits(x).argmax(1))


def test_options_of_the_inference_are_part_of_the_systems_identity() -> None:
    kinds: list[dict[str, Any]] = [{}, {"ensemble": 9}, {"draws": 19}, {"votes": 3}, {"sigma_input": 0.3}]
    assert len({system(Bench(RSE(**options))).hash() for options in kinds}) == len(kinds)


def test_another_mode_is_refused() -> None:
    bench = Bench(RSE())
    with pytest.raises(UserError, match="RSE has no inference mode 'plain'"):
        bench.defense.system(bench.modules, "plain", input_shape=(1, 6, 6), num_classes=4, threat=LINF)


def test_a_network_without_convolutions_has_noise_on_its_image() -> None:
    f = Bench(RSE(), lambda: linear_network([[1.0, 0.0]])).f
    assert sigmas(f) == [0.2]
    x = torch.full((1, 1, 1, 2), 0.5)
    assert not torch.equal(f(x), f(x))
