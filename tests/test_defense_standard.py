"""Standard training: one forward and one backward pass on clean images, in train mode."""

from __future__ import annotations

import math

import pytest
import torch
from stepping import Bench, Probe, batch, linear_network, moved, parameters, tracked

from casemate.defenses.standard import Standard
from casemate.errors import UserError
from casemate.threat import ThreatModel


def test_a_step_is_one_pass_over_the_clean_images() -> None:
    bench, (x, y) = Bench(Standard()), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.train == [True] and passes.frozen == [False] and passes.backwards == 1
    assert torch.equal(passes.inputs[0], x)
    assert tracked(bench.f) == 1
    assert moved(before, bench.f)


def test_the_loss_is_the_mean_cross_entropy() -> None:
    bench = Bench(Standard(), lambda: linear_network([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[0.8, 0.2], [0.1, 0.5]]).view(2, 1, 1, 2)
    ((players, loss),) = bench.step(x, torch.tensor([0, 0]))
    assert players == ("classifier",)
    assert loss == pytest.approx((math.log(1 + math.exp(-0.6)) + math.log(1 + math.exp(0.4))) / 2)


def test_it_learns_one_batch() -> None:
    bench, (x, y) = Bench(Standard(), optimizer=torch.optim.Adam), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(60)]
    assert losses[-1] < losses[0] / 4


def test_what_is_deployed_is_the_classifier_alone() -> None:
    bench, (x, _) = Bench(Standard()), batch()
    threat = ThreatModel("linf", 0.1)
    system = bench.defense.system(bench.modules, "plain", input_shape=(1, 6, 6), num_classes=4, threat=threat)
    with system.frozen():
        assert torch.equal(system.logits(x), bench.f(x))
    assert not system.changes_inference
    with pytest.raises(UserError, match="Standard has no inference mode 'imt'"):
        bench.defense.system(bench.modules, "imt", input_shape=(1, 6, 6), num_classes=4, threat=threat)
