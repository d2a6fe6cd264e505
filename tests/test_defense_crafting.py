"""What defenses share about batch normalisation: the mode they craft in, joint or separate statistics of what they
learn, and the clean forward pass now and then. Judged by the passes and by the running statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import embedding_toys
import pytest
import torch
import torch.nn.functional as F
from adversary_toys import square_batch, square_network
from stepping import Bench, Probe, batch, normed_network, parameters, same, tracked
from torch import Tensor
from training_toys import batch_norm_net, recipe, run

from casemate.defenses.adt_exp import ADTEXP
from casemate.defenses.adt_exp_am import ADTEXPAM
from casemate.defenses.adt_imp_am import ADTIMPAM
from casemate.defenses.atld import ATLD
from casemate.defenses.base import Defense
from casemate.defenses.bilateral import Bilateral
from casemate.defenses.crafting import CleanForward
from casemate.defenses.er import ER
from casemate.defenses.er_trades import ERTrades
from casemate.defenses.feature_scattering import FeatureScattering
from casemate.defenses.l2l_da import L2LDA
from casemate.defenses.mart import MART
from casemate.defenses.tla import TLA
from casemate.defenses.trades import TRADES
from casemate.errors import UserError
from casemate.fields import spec
from casemate.trainable import Context, Update
from casemate.training import graphs
from tests.tape import CPU

ATLD_SMALL: dict[str, Any] = {"critic_depth": 10, "critic_width": 1, "critic_meets_clean": False}
L2L_SMALL: dict[str, Any] = {"width": 4, "steps": 3, "z_dim": 2}
IMP_SMALL: dict[str, Any] = {"width": 4, "encoder_width": 4, "z_dim": 6}


def drawing(n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ctx.draw` of TLA's bench."""
    x, y = batch(64)
    at = torch.arange(n) % 64 if labels is None else labels
    return x[at], y[at]


def made(defense: Any) -> tuple[Any, Tensor, Tensor]:
    """(a bench for the defense, images, labels); the classifier begins with a convolution and a batch norm."""
    if isinstance(defense, ER | ERTrades):
        return embedding_toys.Bench(defense, network=normed_network), *batch()
    if isinstance(defense, ADTEXPAM | ADTIMPAM | L2LDA):
        return Bench(defense, square_network), *square_batch()
    bench = Bench(defense)
    bench.ctx.draw = drawing
    return bench, *batch()


def first(bench: Any) -> tuple[Any, Any]:
    """(the layer that every pass goes through, its batch norm)."""
    layer = bench.f.body["conv"]
    return layer, layer[1]


def means(kernel: Tensor, images: list[Tensor]) -> Tensor:
    """The running mean that those passes leave, in that order."""
    mean = torch.zeros(6)
    for seen in images:
        mean = 0.9 * mean + 0.1 * F.conv2d(seen, kernel).mean((0, 2, 3))
    return mean


# --- the mode of crafting -----------------------------------------------------------------------------------

Made = Callable[..., Any]
CRAFTERS: list[tuple[type, dict[str, Any], int, int, int]] = [
    (TRADES, {"steps": 3}, 4, 0, 2),
    (MART, {"steps": 3}, 3, 0, 2),
    (FeatureScattering, {}, 2, 0, 1),
    (ADTEXP, {"steps": 3, "samples": 2}, 3, 0, 1),
    (ADTEXP, {"steps": 3, "samples": 2, "loss": "trades"}, 4, 0, 2),
    (ADTEXPAM, {"width": 4}, 2, 0, 1),
    (ADTIMPAM, IMP_SMALL, 2, 0, 1),
    (L2LDA, L2L_SMALL, 4, 0, 1),
    (ER, {"steps": 3, "critic_width": 8}, 3, 0, 2),
    (ERTrades, {"steps": 3, "critic_width": 8}, 4, 0, 2),
    (TLA, {"steps": 3, "dictionary": 2}, 3, 2, 4),
    (Bilateral, {}, 2, 0, 1),
    (ATLD, ATLD_SMALL, 2, 0, 1),
]
"""Options, passes that craft, passes that look for something else in eval mode, passes that teach."""


@pytest.mark.parametrize("mode", ["eval", "train", "train_update"])
@pytest.mark.parametrize(("kind", "options", "crafted", "sought", "outer"), CRAFTERS, ids=lambda v: str(v)[:40])
def test_running_statistics_see_what_the_mode_says(
    kind: Made, options: dict[str, Any], crafted: int, sought: int, outer: int, mode: str
) -> None:
    bench, x, y = made(kind(**options, bn_mode_attack=mode))
    layer, norm = first(bench)
    kernel = layer[0].weight.detach().clone()
    with Probe(layer) as passes:
        bench.step(x, y)
    assert passes.train == [mode != "eval"] * crafted + [False] * sought + [True] * outer
    assert passes.frozen == [True] * (crafted + sought) + [False] * outer
    moved = passes.inputs[crafted + sought :]
    if mode == "train_update":
        moved = passes.inputs[:crafted] + moved
    assert tracked(bench.f) == len(moved)
    torch.testing.assert_close(norm.running_mean, means(kernel, moved))
    assert norm.track_running_stats and all(p.requires_grad for p in bench.f.parameters())


@pytest.mark.parametrize("kind", sorted({row[0] for row in CRAFTERS}, key=lambda kind: kind.__name__))
def test_published_defenses_craft_in_eval_mode(kind: Made) -> None:
    assert kind().bn_mode_attack == "eval"


@pytest.mark.parametrize("kind", [ER, ERTrades])
def test_crafting_with_the_statistics_of_one_image_is_refused(kind: Made) -> None:
    x, y = embedding_toys.batch(1)
    with pytest.raises(UserError, match="set drop_last"):
        embedding_toys.Bench(kind(steps=1, critic_width=8, bn_mode_attack="train")).step(x, y)


# --- joint statistics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "joint", "sizes"),
    [
        (TRADES, {"steps": 2}, "separate", [8, 8]),
        (TRADES, {"steps": 2}, "concat", [16]),
        (TRADES, {"steps": 2, "third_forward": True}, "separate", [8, 8, 8]),
        (TRADES, {"steps": 2, "third_forward": True}, "concat", [24]),
        (MART, {"steps": 2}, "separate", [8, 8]),
        (MART, {"steps": 2}, "concat", [16]),
        (L2LDA, L2L_SMALL, "concat", [24]),
        (L2LDA, L2L_SMALL, "separate", [8, 16]),
        (L2LDA, {**L2L_SMALL, "f_update": "sum"}, "separate", [8, 16]),
    ],
    ids=str,
)
def test_clean_and_adversarial_images_share_statistics_or_do_not(
    kind: Made, options: dict[str, Any], joint: str, sizes: list[int]
) -> None:
    bench, x, y = made(kind(**options, bn_joint=joint))
    layer, norm = first(bench)
    f = copy.deepcopy(bench.f).train()
    with Probe(layer) as passes:
        *_, (_, loss) = bench.step(x, y)
    learnt = passes.inputs[-len(sizes) :]
    assert [len(seen) for seen in learnt] == sizes and tracked(bench.f) == len(sizes)
    torch.testing.assert_close(norm.running_mean, means(f.body["conv"][0].weight.detach(), learnt))
    clean, adversarial = torch.cat([f(seen) for seen in learnt]).detach().split([8, sum(sizes) - 8])
    assert torch.equal(torch.cat(learnt)[:8], x)
    if kind is L2LDA:
        natural, robust = F.cross_entropy(clean, y), F.cross_entropy(adversarial, y.repeat(2))
        expected = natural + robust if "f_update" in options else (natural + 2 * robust) / 3
    else:
        p, q = clean.softmax(1), adversarial[:8].softmax(1)
        kl, own = (p * (p / q).log()).sum(1), torch.arange(8)
        wrong = q.scatter(1, y[:, None], 0).amax(1)
        expected = F.cross_entropy(clean, y) + 6 * kl.mean()
        if kind is MART:
            expected = (-q[own, y].log() - (1.0001 - wrong).log() + 5 * kl * (1 - p[own, y])).mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_joint_statistics_change_what_is_learnt() -> None:
    for kind, options in ((TRADES, {"steps": 2}), (MART, {"steps": 2}), (L2LDA, L2L_SMALL)):
        benches = [made(kind(**options, bn_joint=joint)) for joint in ("concat", "separate")]
        for bench, x, y in benches:
            bench.step(x, y)
        assert not same(*(parameters(bench.f) for bench, _, _ in benches))


# --- the clean forward pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FeatureScattering, ATLD])
def test_every_so_many_steps_statistics_see_clean_images(kind: Made) -> None:
    small = ATLD_SMALL if kind is ATLD else {}
    for every, due in ((0, []), (2, [0, 2]), (3, [0, 3])):
        bench, x, y = made(kind(**small, clean_forward_every=every))
        layer, _ = first(bench)
        for step in range(4):
            bench.ctx.logs.clear()
            with Probe(layer) as passes:
                bench.step(x, y)
            assert ("train_clean" in bench.ctx.logs) == (step in due)
            assert [torch.equal(seen, x) for seen in passes.inputs] == [True, False, False] + [True] * (step in due)
            assert passes.train == [False, False, True] + [True] * (step in due)
        assert tracked(bench.f) == 4 + len(due)
    assert kind().clean_forward_every == 0


@pytest.mark.parametrize("kind", [FeatureScattering, ATLD])
def test_the_clean_pass_comes_after_the_updates_and_moves_only_the_statistics(kind: Made) -> None:
    found, small = [], ATLD_SMALL if kind is ATLD else {}
    for every in (0, 1):
        bench, x, y = made(kind(**small, clean_forward_every=every))
        layer, norm = first(bench)
        bench.step(x, y)
        found.append((parameters(bench.f), norm.running_mean.clone(), layer[0](x).detach().mean((0, 2, 3))))
    (without, plain, _), (with_it, leaked, clean) = found
    assert same(without, with_it)
    torch.testing.assert_close(leaked, 0.9 * plain + 0.1 * clean)


@spec
class Plain(CleanForward, Defense):
    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield Update(("classifier",), lambda: F.cross_entropy(ctx.modules["classifier"](x), y))
        self.look_at_clean(ctx, x, y)


def test_a_run_with_clean_passes_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(graphs.BACKENDS, "cpu", CPU)
    trained = []
    for graph in (False, True):
        method = Plain(clean_forward_every=3)
        trained.append(run(method, recipe(epochs=4, cuda_graph=graph), network=batch_norm_net))
    assert "depends on how far training is" in capsys.readouterr().err
    states = [made.modules["classifier"].state_dict() for made in trained]
    assert same(*states) and int(states[0]["1.num_batches_tracked"]) == 16 + 6
