"""ALP: passes, joint batch statistics, the loss by hand, attack labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, tracked
from torch import Tensor, nn

from casemate.defenses.alp import ALP
from casemate.defenses.at_pgd import ATPGD
from casemate.threat import ThreatModel

THREE = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize(("joint", "outer"), [("concat", [16]), ("separate", [8, 8])])
def test_passes_and_running_statistics(joint: Any, outer: list[int]) -> None:
    bench, (x, y) = Bench(ALP(steps=4, bn_joint=joint)), batch()
    before = parameters(bench.f)
    kernel = bench.f.body["conv"][0].weight.detach().clone()  # type: ignore[index]
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert [len(seen) for seen in passes.inputs] == [8] * 4 + outer
    assert passes.train == [False] * 4 + [True] * len(outer) and passes.frozen == [not t for t in passes.train]
    assert passes.backwards == 4 + len(outer) and moved(before, bench.f) and tracked(bench.f) == len(outer)
    learned = torch.cat(passes.inputs[4:])
    assert torch.equal(learned[:8], x) and bool(LINF.contains(learned[8:], x).all())
    expected = torch.zeros(6)
    for seen in passes.inputs[4:]:
        expected = 0.9 * expected + 0.1 * F.conv2d(seen, kernel).mean((0, 2, 3))
    norm = bench.f.body["conv"][1]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight": 2.0}, {"clean_ce": False}, {"label_smoothing": 0.3}, {"bn_joint": "separate", "weight": 0.0}],
)
def test_the_loss_by_hand(options: dict[str, Any]) -> None:
    bench = Bench(ALP(steps=3, **options), lambda: linear_network(THREE))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, y)
    w = torch.tensor(THREE)
    clean, adversarial = x.view(2, 2) @ w.T, torch.cat(passes.inputs[3:])[2:].view(2, 2) @ w.T

    def ce(logits: Tensor) -> Tensor:
        s = options.get("label_smoothing", 0.0)
        target = (1 - s) * F.one_hot(y, 3) + s / 3
        return -(target * logits.log_softmax(1)).sum(1).mean()

    learned = ce(adversarial) if "clean_ce" in options else (ce(clean) + ce(adversarial)) / 2
    expected = learned + options.get("weight", 0.5) * (clean - adversarial).square().sum() / 6
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert float((clean - adversarial).abs().max()) > 0.05


def test_no_radius_pairs_nothing() -> None:
    bench = Bench(ALP(steps=2), threat=ThreatModel("linf", 0.0))
    bench.step(*batch())
    assert float(bench.ctx.logs["pairing"]) == pytest.approx(0, abs=1e-10)


def test_the_default_attack_is_that_of_at_pgd() -> None:
    crafted = []
    for defense in (ALP(steps=3), ATPGD(steps=3)):
        bench, (x, y) = Bench(defense), batch()
        with Probe(bench.f) as passes:
            bench.step(x, y)
        crafted.append(passes.inputs[3][-8:])
    assert torch.equal(*crafted)


@pytest.mark.parametrize(("labels", "corner"), [("true", 1), ("predicted", 2), ("least_likely", 0)])
def test_what_the_attack_is_after(labels: Any, corner: int) -> None:
    """x = (.5, .4): logits -.3, .4, .45. Away from the label 1, away from the prediction 2, or towards class 0."""
    bench = Bench(ALP(steps=6, attack_labels=labels), lambda: linear_network(THREE))
    x, y = torch.tensor([0.5, 0.4]).view(1, 1, 1, 2), torch.tensor([1])
    with Probe(bench.f) as passes:
        bench.step(x, y)
    extra = 0 if labels == "true" else 1
    assert len(passes.inputs) == 6 + 1 + extra and passes.backwards == 7, "the prediction is one forward pass more"
    w, at = torch.tensor(THREE), x.clone().requires_grad_()
    sign = -1 if labels == "least_likely" else 1
    (slope,) = torch.autograd.grad(sign * F.cross_entropy(at.view(1, 2) @ w.T, torch.tensor([corner])), at)
    x_adv = passes.inputs[-1][1:]
    assert torch.equal((x_adv - x).sign(), slope.sign())


@pytest.mark.parametrize(("bn", "updates"), [("eval", 1), ("train", 1), ("train_update", 4)])
def test_crafting_modes(bn: Any, updates: int) -> None:
    bench, (x, y) = Bench(ALP(steps=3, bn_mode_attack=bn)), batch()
    bench.step(x, y)
    assert tracked(bench.f) == updates


def test_it_learns_one_batch() -> None:
    threat = ThreatModel("linf", 0.02)
    bench, (x, y) = Bench(ALP(steps=3), optimizer=torch.optim.Adam, threat=threat), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(120)]
    assert losses[-1] < losses[0] / 3 and bool((bench.f(x).argmax(1) == y).all())
