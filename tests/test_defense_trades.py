"""TRADES: passes, batch-norm statistics, hand-computed loss, gradient through both arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stepping import Bench, Probe, batch, linear_network, moved, parameters, tracked

from casemate.defenses.trades import TRADES
from casemate.seeding import generator
from casemate.threat import ThreatModel


@pytest.mark.parametrize(("third", "outer"), [(False, 2), (True, 3)])
def test_passes_and_running_statistics(third: bool, outer: int) -> None:
    bench, (x, y) = Bench(TRADES(steps=4, third_forward=third)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * 5 + [False] * outer
    assert passes.train == [False] * 5 + [True] * outer
    assert passes.backwards == 4 + outer
    assert tracked(bench.f) == outer
    clean = [torch.equal(seen, x) for seen in passes.inputs]
    assert clean == [True] + [False] * 4 + [True, False, True][:outer]
    assert moved(before, bench.f)


def test_the_third_forward_changes_statistics_and_not_the_loss() -> None:
    losses = [Bench(TRADES(steps=3, third_forward=third)).step(*batch())[0][1] for third in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_start_is_a_small_gaussian_and_the_end_is_in_the_ball() -> None:
    threat = ThreatModel("linf", 0.05)
    bench, (x, y) = Bench(TRADES(steps=6), threat=threat), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    noise = torch.randn(x.shape, generator=generator("step", 0))
    torch.testing.assert_close(passes.inputs[1], x + 0.001 * noise)
    x_adv = passes.inputs[-1]
    assert bool(threat.contains(x_adv, x).all())
    assert float((x_adv - x).abs().max()) == pytest.approx(0.05, abs=1e-6)


def test_labels_do_not_matter_to_the_adversary() -> None:
    crafted = []
    for shift in (0, 1):
        bench, (x, y) = Bench(TRADES(steps=3)), batch()
        with Probe(bench.f) as passes:
            bench.step(x, y.roll(shift))
        crafted.append(passes.inputs[-1])
    assert torch.equal(crafted[0], crafted[1])


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_the_loss_by_hand(beta: float) -> None:
    weight = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]
    bench = Bench(TRADES(steps=3, beta=beta), lambda: linear_network(weight))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), np.array([0, 1])
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, torch.from_numpy(y))

    def softmax(images: torch.Tensor) -> np.ndarray:
        z = np.exp(images.double().view(2, 2).numpy() @ np.array(weight).T)
        return z / z.sum(1, keepdims=True)

    p, q = softmax(x), softmax(passes.inputs[-1])
    kl = (p * np.log(p / q)).sum(1).mean()
    assert kl > 1e-4
    assert loss == pytest.approx(-np.log(p[[0, 1], y]).mean() + beta * kl, rel=1e-5)


def test_no_radius_leaves_the_clean_loss() -> None:
    zero = ThreatModel("linf", 0.0)
    losses = [Bench(TRADES(steps=2, beta=beta), threat=zero).step(*batch())[0][1] for beta in (0.0, 6.0)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_gradient_flows_through_both_arguments() -> None:
    """Against finite differences of the same loss at the same x_adv, in float64."""
    bench = Bench(TRADES(steps=3, beta=6.0), lambda: linear_network([[1.0, -2.0], [0.0, 1.0]]).double(), lr=1.0)
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2).double(), torch.tensor([0, 1])
    before = bench.f.head.weight.detach().clone()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    gradient = before - bench.f.head.weight.detach()
    x_adv = passes.inputs[-1].view(2, 2)

    def loss(weight: torch.Tensor) -> float:
        p, q = (x.view(2, 2) @ weight.T).softmax(1), (x_adv @ weight.T).softmax(1)
        return float(-p[[0, 1], y].log().mean() + 6.0 * (p * (p / q).log()).sum(1).mean())

    for i in range(2):
        for j in range(2):
            h = torch.zeros(2, 2, dtype=torch.float64)
            h[i, j] = 1e-5
            # The network computes its losses in float32, hence the tolerance.
            slope = (loss(before + h) - loss(before - h)) / 2e-5
            assert float(gradient[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = TRADES()
    assert (chosen.beta, chosen.steps, chosen.bn_joint) == (6.0, 10, "separate")


def test_it_learns_one_batch() -> None:
    bench, (x, y) = (
        Bench(TRADES(steps=3, beta=1.0), optimizer=torch.optim.Adam, threat=ThreatModel("linf", 0.05)),
        batch(),
    )
    losses = [bench.step(x, y)[0][1] for _ in range(80)]
    assert losses[-1] < losses[0] / 3
