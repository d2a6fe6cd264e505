"""fgsm_ll: targets, passes, and the mixed batch of Kurakin et al."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, tracked

from casemate.defenses.fgsm_ll import FGSMLL, half_normal, other_class
from casemate.threat import ThreatModel

THREE = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]


def test_the_target_comes_from_the_pass_that_gives_the_gradient() -> None:
    bench, (x, y) = Bench(FGSMLL()), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert (passes.frozen, passes.train, passes.backwards) == ([True, False], [False, True], 2)
    assert torch.equal(passes.inputs[0], x) and moved(before, bench.f) and tracked(bench.f) == 1
    assert float((passes.inputs[1] - x).abs().max()) == pytest.approx(LINF.radius, abs=1e-6)


def test_it_moves_towards_the_least_likely_class_whatever_the_label() -> None:
    """x = (.5, .4): logits -.3, .4, .45, so the target is class 0, reached along +w_0 - sum p_j w_j."""
    for label in (1, 2):
        bench = Bench(FGSMLL(), lambda: linear_network(THREE))
        x = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2)
        with Probe(bench.f) as passes:
            ((_, loss),) = bench.step(x, torch.tensor([label]))
        torch.testing.assert_close(passes.inputs[1].flatten(), torch.tensor([0.6, 0.3]))
        z = [0.6 - 0.6, 0.3, 0.45]
        assert loss == pytest.approx(math.log(sum(map(math.exp, z))) - z[label], rel=1e-5)


def test_a_random_target_is_any_other_class() -> None:
    y = torch.arange(4).repeat(500)
    target = other_class(y, 4, torch.Generator().manual_seed(0))
    assert not bool((target == y).any())
    counts = torch.bincount(4 * y + target, minlength=16).view(4, 4)
    assert bool((counts[~torch.eye(4, dtype=torch.bool)] > 120).all())
    crafted = []
    for target in ("least_likely", "random"):
        bench, (x, y) = Bench(FGSMLL(target=target)), batch()  # type: ignore[arg-type]
        with Probe(bench.f) as passes:
            bench.step(x, y)
        crafted.append(passes.inputs[1])
    assert not torch.equal(*crafted)


def test_the_random_radius_is_a_normal_cut_at_two() -> None:
    drawn = half_normal(torch.zeros(20000, 1, 1, 1), torch.Generator().manual_seed(0)).flatten()
    assert 0 <= float(drawn.min()) < 0.01 and 1.95 < float(drawn.max()) <= 2
    # mean of |N(0, 1)| given |N| < 2: sqrt(2 / pi) (1 - e^-2) / erf(sqrt 2)
    assert float(drawn.mean()) == pytest.approx(0.79788 * (1 - math.exp(-2)) / math.erf(math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize(("n", "clean"), [(8, 4), (5, 2), (1, 0)])
def test_the_mixed_batch_is_half_clean_in_one_pass(n: int, clean: int) -> None:
    bench, (x, y) = Bench(FGSMLL(images="mixed")), batch()
    x, y = x[:n], y[:n]
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert [len(seen) for seen in passes.inputs] == [n - clean, n] and passes.backwards == 2
    assert torch.equal(passes.inputs[1][:clean], x[:clean])
    moves = (passes.inputs[1][clean:] - x[clean:]).abs().flatten(1).amax(1)
    assert bool((moves <= 2 * LINF.radius + 1e-6).all())
    assert len(moves.unique()) == n - clean, "each image has its own radius"


def test_the_mixed_loss_by_hand() -> None:
    bench = Bench(FGSMLL(images="mixed", adversarial_weight=0.25), lambda: linear_network(THREE))
    x, y = torch.rand(4, 1, 1, 2, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0])
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, y)
    each = F.cross_entropy(passes.inputs[1].view(4, 2) @ torch.tensor(THREE).T, y, reduction="none")
    expected = (each[:2].sum() + 0.25 * each[2:].sum()) / (2 + 0.25 * 2)
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("mode", "updates"), [("eval", 1), ("train", 1), ("train_update", 2)])
def test_running_statistics_see_what_the_mode_says(mode: Any, updates: int) -> None:
    bench, (x, y) = Bench(FGSMLL(bn_mode_attack=mode)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.train == [mode != "eval", True] and tracked(bench.f) == updates


def test_l2_moves_by_the_radius() -> None:
    bench, (x, y) = Bench(FGSMLL(), threat=ThreatModel("l2", 0.2)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y)
    torch.testing.assert_close((passes.inputs[1] - x).flatten(1).norm(dim=1), torch.full((8,), 0.2))


def test_the_radius_grows_over_the_ramp() -> None:
    bench, (x, y) = Bench(FGSMLL(ramp=0.5)), batch()
    with Probe(bench.f) as passes:
        bench.step(x, y, 0.25)
    assert float((passes.inputs[1] - x).abs().max()) == pytest.approx(LINF.radius / 2, abs=1e-6)


@pytest.mark.parametrize("images", ["adversarial", "mixed"])
def test_it_learns_one_batch(images: Any) -> None:
    threat = ThreatModel("linf", 0.02)
    bench, (x, y) = Bench(FGSMLL(images=images), optimizer=torch.optim.Adam, threat=threat), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and float(bench.ctx.logs["train_robust"]) == 1.0
