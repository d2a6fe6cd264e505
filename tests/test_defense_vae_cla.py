"""VAE-CLA: the loss by hand with and without a decoder, the noise, the mean code at inference, its options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding_toys import LINF, SHAPE, Bench, batch, first_layer, straight_and_resumed
from training_toys import same as same_weights
from training_toys import weights

from casemate.defenses.vae_cla import VAECLA, gaussian_divergence
from casemate.errors import UserError
from casemate.networks.base import build_network
from casemate.seeding import generator


def small(**options: Any) -> VAECLA:
    return VAECLA(**{"regulariser": 0.1, "decoder_width": 2, **options})


def test_the_divergence_of_a_gaussian() -> None:
    """KL(N(m, v) || N(0, 1)) against numerical integration; zero for the prior itself."""
    mean, log_variance = torch.tensor([[0.0, 0.0], [1.5, -0.5]]), torch.tensor([[0.0, 0.0], [0.7, -1.2]])
    assert gaussian_divergence(mean, log_variance)[0] == 0
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    total = 0.0
    for m, lv in zip([1.5, -0.5], [0.7, -1.2], strict=True):
        p, q = torch.distributions.Normal(m, float(torch.tensor(lv / 2).exp())), torch.distributions.Normal(0.0, 1.0)
        total += float(torch.trapezoid(p.log_prob(grid).exp() * (p.log_prob(grid) - q.log_prob(grid)), grid))
    assert float(gaussian_divergence(mean, log_variance)[1]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("decoder", [False, True])
def test_the_loss_by_hand(decoder: bool) -> None:
    bench, (x, y) = Bench(small(decoder=decoder, reconstruction=3.0)), batch()
    made = {name: copy.deepcopy(module).train() for name, module in bench.modules.items()}
    with first_layer(bench) as q:
        ((players, loss),) = bench.step(x, y)
    assert q.train == [True] and q.backwards == 1
    assert players == ("encoder", "head", "log_variance") + (("decoder",) if decoder else ())
    f = made["classifier"]
    assert hasattr(f, "taps")
    seen = f.taps(x, ["pool"])["pool"]
    mean, log_variance = f.body["code"](seen), made["log_variance"](seen)
    z = mean + log_variance.exp().sqrt() * torch.randn(8, 3, generator=generator("step", 0))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 8
    expected = F.cross_entropy(f.head(z), y) + 0.1 * kl
    if decoder:
        expected = expected + 3.0 * (made["decoder"](z) - x).square().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("decoder", [False, True])
def test_everything_moves(decoder: bool) -> None:
    bench, (x, y) = Bench(small(decoder=decoder)), batch()
    names = ["log_variance", "head"] + ["decoder"] * decoder
    before = {name: bench.part(name) for name in names}
    encoder = bench.encoder()
    bench.step(x, y)
    for name in names:
        assert any(not torch.equal(a, b) for a, b in zip(before[name], bench.part(name), strict=True)), name
    assert any(not torch.equal(a, b) for a, b in zip(encoder, bench.encoder(), strict=True))
    assert set(bench.modules) == {"classifier", "log_variance"} | ({"decoder"} if decoder else set())


def test_a_strong_divergence_brings_codes_to_the_prior() -> None:
    bench, (x, y) = Bench(small(regulariser=50.0)), batch(32)
    bench.step(x, y)
    first = float(bench.ctx.logs["divergence"])
    for _ in range(80):
        bench.step(x, y)
    assert float(bench.ctx.logs["divergence"]) < 0.5 * first


def test_inference_takes_the_mean_code() -> None:
    bench, (x, y) = Bench(small()), batch()
    bench.step(x, y)
    system = bench.defense.system(bench.modules, "plain", input_shape=SHAPE, num_classes=4, threat=LINF)
    with system.frozen():
        one, other = system.logits(x), system.logits(x)
        assert torch.equal(one, other)
        assert torch.equal(one, bench.f.head(bench.f.features(x)))


@pytest.mark.parametrize("decoder", [False, True])
def test_it_learns_one_batch(decoder: bool) -> None:
    bench, (x, y) = Bench(small(regulariser=0.001, decoder=decoder, head_lr_scale=1.0)), batch()
    logs = []
    for _ in range(120):
        bench.step(x, y)
        logs.append({name: float(value) for name, value in bench.ctx.logs.items()})
    assert logs[-1]["entropy"] < 0.4 * logs[0]["entropy"]
    assert bool((bench.f.eval()(x).argmax(1) == y).all())
    if decoder:
        assert logs[-1]["error"] < 0.5 * logs[0]["error"]


def test_a_network_without_a_linear_code_is_refused() -> None:
    other = lambda: build_network("digits_cnn", input_shape=SHAPE, num_classes=4)  # noqa: E731
    with pytest.raises(UserError, match="vae_cla needs a network whose code"):
        Bench(small(), network=other)


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Any) -> None:
    straight, resumed = straight_and_resumed(small(decoder=True), tmp_path)
    for name in ("classifier", "log_variance", "decoder"):
        assert same_weights(weights(resumed, name), weights(straight, name))
