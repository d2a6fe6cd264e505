"""ER-Trades: passes, labels that the adversary never sees, the whole loss by hand, its options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from embedding_toys import Bench, batch, first_layer, same, straight_and_resumed
from training_toys import same as same_weights
from training_toys import weights

from casemate.defenses.er_trades import ERTrades
from casemate.seeding import generator
from casemate.threat import ThreatModel


def small(**options: Any) -> ERTrades:
    return ERTrades(**{"steps": 3, "critic_width": 16, "regulariser": 0.1, **options})


def test_passes_of_the_encoder() -> None:
    bench, (x, y) = Bench(small(steps=20)), batch()
    with first_layer(bench) as q:
        done = bench.step(x, y)
    assert len(q.train) == 23 and q.backwards == 22
    assert q.train == [False] * 21 + [True] * 2 and q.frozen == [True] * 21 + [False] * 2
    assert [players for players, _ in done] == [("critic",), ("encoder", "head")]


def test_the_start_is_a_small_gaussian_and_labels_do_not_matter_to_the_adversary() -> None:
    crafted = []
    for shift in (0, 1):
        bench, (x, y) = Bench(small()), batch()
        with first_layer(bench) as q:
            bench.step(x, y.roll(shift))
        crafted.append(q.inputs[-1])
    noise = torch.randn(x.shape, generator=generator("step", 0))
    torch.testing.assert_close(q.inputs[1], 2 * (x + 0.001 * noise) - 1)
    assert torch.equal(*crafted)
    x_adv = (crafted[0] + 1) / 2
    assert bool(bench.threat.contains(x_adv, x).all()) and float((x_adv - x).abs().max()) > 0.05


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_the_loss_by_hand(beta: float) -> None:
    bench, (x, y) = Bench(small(beta=beta)), batch()
    f, d = copy.deepcopy(bench.f).train(), bench.modules["critic"]
    with first_layer(bench) as q:
        _, (_, loss) = bench.step(x, y)
    codes = [f.features(x), f.features((q.inputs[-1] + 1) / 2)]
    p, r = (f.head(z).double().softmax(1) for z in codes)
    expected = F.nll_loss(p.log(), y) + beta * (p * (p / r).log()).sum(1).mean()
    expected = expected + 0.1 * d(torch.cat(codes)).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_the_regulariser_reaches_the_encoder_and_not_the_head() -> None:
    moves = {}
    for weight in (0.0, 1000.0):
        bench, (x, y) = Bench(small(regulariser=weight)), batch()
        bench.step(x, y)
        moves[weight] = bench.encoder(), bench.part("head")
    assert not same(moves[0.0][0], moves[1000.0][0]) and same(moves[0.0][1], moves[1000.0][1])


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(small(steps=2, head_lr_scale=1.0), threat=ThreatModel("linf", 0.02)), batch()
    bench.f.eval()
    before = F.cross_entropy(bench.f(x), y).item()
    for _ in range(60):
        bench.step(x, y)
    bench.f.eval()
    assert F.cross_entropy(bench.f(x), y).item() < 0.3 * before
    assert bool((bench.f(x).argmax(1) == y).all())


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Any) -> None:
    straight, resumed = straight_and_resumed(small(steps=1), tmp_path)
    assert same_weights(weights(resumed), weights(straight))
