"""MART: passes, start, loss by hand, gradient through everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stepping import Bench, Probe, batch, linear_network, moved, parameters, tracked

from casemate.defenses.mart import MART
from casemate.seeding import generator
from casemate.threat import ThreatModel

THREE = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]


def by_hand(weight: np.ndarray, x: np.ndarray, x_adv: np.ndarray, y: np.ndarray, beta: float) -> float:
    def softmax(images: np.ndarray) -> np.ndarray:
        z = np.exp(images @ weight.T)
        return z / z.sum(1, keepdims=True)

    p, q, at = softmax(x), softmax(x_adv), np.arange(len(y))
    wrong = np.where(np.eye(p.shape[1])[y] == 1, 0, q).max(1)
    boosted = -np.log(q[at, y]) - np.log(1.0001 - wrong + 1e-12)
    kl = (p * np.log(p / q)).sum(1)
    return float(boosted.mean() + beta * (kl * (1 - p[at, y])).mean())


def test_passes_and_running_statistics() -> None:
    bench, (x, y) = Bench(MART(steps=4)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * 4 + [False] * 2 and passes.train == [False] * 4 + [True] * 2
    assert passes.backwards == 6 and tracked(bench.f) == 2 and moved(before, bench.f)
    assert torch.equal(passes.inputs[4], x) and not torch.equal(passes.inputs[5], x)


def test_the_start_is_a_small_gaussian_and_the_end_is_in_the_ball() -> None:
    threat = ThreatModel("linf", 0.05)
    bench, (x, y) = Bench(MART(steps=6), threat=threat), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    torch.testing.assert_close(passes.inputs[0], x + 0.001 * torch.randn(x.shape, generator=generator("step", 0)))
    assert bool(threat.contains(passes.inputs[-1], x).all())


def test_the_attack_ascends_the_cross_entropy_of_the_label() -> None:
    bench = Bench(MART(steps=6), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]))
    x = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2).expand(2, 1, 1, 2)
    with Probe(bench.f) as passes:
        bench.step(x, torch.tensor([0, 1]))
    torch.testing.assert_close(passes.inputs[-1].view(2, 2), torch.tensor([[0.4, 0.5], [0.6, 0.3]]))


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_the_loss_by_hand(beta: float) -> None:
    bench = Bench(MART(steps=3, beta=beta), lambda: linear_network(THREE))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, y)
    images = [t.double().view(2, 2).numpy() for t in (x, passes.inputs[-1])]
    assert loss == pytest.approx(by_hand(np.array(THREE), *images, y.numpy(), beta), rel=1e-5)


def test_the_gradient_flows_through_the_weight_and_both_predictions() -> None:
    """Against finite differences of the same loss at the same x_adv."""
    bench = Bench(MART(steps=3), lambda: linear_network(THREE).double(), lr=1.0)
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2).double(), torch.tensor([0, 1])
    before = bench.f.head.weight.detach().clone()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    gradient = (before - bench.f.head.weight.detach()).numpy()
    images = [t.view(2, 2).numpy() for t in (x, passes.inputs[-1])]
    for i in range(3):
        for j in range(2):
            h = np.zeros((3, 2))
            h[i, j] = 1e-5
            up, down = (by_hand(before.numpy() + s * h, *images, y.numpy(), 5.0) for s in (1, -1))
            assert float(gradient[i, j]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5)


def test_a_certain_mistake_has_a_finite_loss() -> None:
    bench = Bench(MART(steps=1), lambda: linear_network([[0.0, 0.0], [500.0, 500.0]]))
    ((_, loss),) = bench.step(torch.ones(1, 1, 1, 2), torch.tensor([0]))
    assert np.isfinite(loss) and bool(bench.f.head.weight.isfinite().all())


def test_it_learns_one_batch() -> None:
    threat = ThreatModel("linf", 0.02)
    bench, (x, y) = Bench(MART(steps=3, beta=1.0), optimizer=torch.optim.Adam, threat=threat), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and bool((bench.f(x).argmax(1) == y).all())
