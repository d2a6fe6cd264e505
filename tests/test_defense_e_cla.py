"""E-CLA: cross-entropy on clean images, and nothing else."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from embedding_toys import Bench, batch, first_layer
from stepping import tracked

from casemate.defenses.e_cla import ECLA
from casemate.errors import UserError


def test_one_pass_one_gradient_no_critic() -> None:
    bench, (x, y) = Bench(ECLA()), batch()
    before = [bench.encoder(), bench.part("head")]
    with first_layer(bench) as q:
        ((players, loss),) = bench.step(x, y)
    assert q.train == [True] and q.backwards == 1 and tracked(bench.f.body) == 1
    assert players == ("encoder", "head") and set(bench.modules) == {"classifier"}
    fresh = Bench(ECLA()).f.train()
    assert loss == pytest.approx(F.cross_entropy(fresh(x), y).item(), rel=1e-6)
    for was, now in zip(before, [bench.encoder(), bench.part("head")], strict=True):
        assert any(not bool((a == b).all()) for a, b in zip(was, now, strict=True))


def test_the_head_learns_at_its_share_of_the_rate() -> None:
    rates = {n: p.optimizer.param_groups[0]["lr"] for n, p in Bench(ECLA(head_lr_scale=0.3)).players.items()}
    assert rates == pytest.approx({"encoder": 0.01, "head": 0.003})
    rates = {n: p.optimizer.param_groups[0]["lr"] for n, p in Bench(ECLA()).players.items()}
    assert rates == pytest.approx({"encoder": 0.01, "head": 0.0005})


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(ECLA(head_lr_scale=1.0)), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(60)]
    assert losses[-1] < 0.3 * losses[0]
    assert bool((bench.f.eval()(x).argmax(1) == y).all())


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="set drop_last"):
        Bench(ECLA()).step(*batch(1))
