"""Feature Scattering: the transport plan, the label-free step up its cost, soft labels, passes and modes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stepping import LINF, Bench, Probe, batch, linear_network, moved, parameters, tracked
from torch import Tensor

from casemate.defenses.feature_scattering import FeatureScattering, cosine_cost, proximal_points, sinkhorn
from casemate.errors import UserError
from casemate.seeding import generator
from casemate.threat import ThreatModel


def codes(n: int, seed: int, d: int = 5) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# --- the plan -----------------------------------------------------------------------------------------------


def test_the_cost_is_one_minus_the_cosine() -> None:
    a = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [5.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[1.0, 0.0, 2.0, 1 - 0.5**0.5], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(cosine_cost(a, b), expected)


def test_the_published_stopping_rule_fits_the_columns_and_leaves_the_rows() -> None:
    """With rows fitted first and the rule of 0.1, the plan is stopped before it is a coupling."""
    cost = cosine_cost(codes(50, 0, 10), codes(50, 1, 10))
    rough, fine = sinkhorn(cost, 0.01, 100, 0.1), sinkhorn(cost, 0.01, 3000, 1e-6)
    for plan in (rough, fine):
        torch.testing.assert_close(plan.sum(0), torch.full((50,), 1 / 50), atol=2e-5, rtol=0)
        assert float(plan.sum()) == pytest.approx(1, abs=1e-3)
    error = {name: float((plan.sum(1) - 1 / 50).abs().max()) for name, plan in (("rough", rough), ("fine", fine))}
    assert 5e-3 < error["rough"] < 0.04
    assert error["fine"] < 1e-4


def test_the_iteration_by_hand() -> None:
    """Two iterations in float64, written out in scaling form, K = exp(-C / .5)."""
    cost = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    kernel = (-cost.double() / 0.5).exp()
    u = v = torch.ones(2, dtype=torch.float64)
    for _ in range(2):
        # the published logarithm adds 1e-6 to the whole scaled row, so the scaling is divided by row + 1e-6
        u = u * 0.5 / (u * (kernel @ v) + 1e-6)
        v = v * 0.5 / (v * (kernel.T @ u) + 1e-6)
    torch.testing.assert_close(sinkhorn(cost, 0.5, 2, 1e-9).double(), u[:, None] * kernel * v, rtol=1e-5, atol=1e-6)


def test_iterations_and_tolerance_both_stop_it() -> None:
    cost = cosine_cost(codes(8, 0), codes(8, 1))
    once = sinkhorn(cost, 0.05, 1, 1e-9)
    assert torch.equal(sinkhorn(cost, 0.05, 100, 1e9), once)
    assert not torch.allclose(sinkhorn(cost, 0.05, 100, 1e-9), once)


def test_proximal_points_reach_the_best_assignment() -> None:
    cost = cosine_cost(codes(5, 2), codes(5, 3))
    best = min(sum(float(cost[i, j]) for i, j in enumerate(order)) / 5 for order in itertools.permutations(range(5)))
    plan = proximal_points(cost, 0.05, 400)
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2), atol=1e-4, rtol=0)
    assert float((plan * cost).sum()) == pytest.approx(best, abs=1e-3)
    blurred = sinkhorn(cost, 0.5, 400, 1e-9)
    assert float((blurred * cost).sum()) > best + 0.05


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
def test_the_order_of_the_batch_is_no_cost_and_other_codes_are(solver: Any) -> None:
    cost = FeatureScattering(ot_solver=solver).transport_cost
    z = codes(12, 4)
    same = float(cost(z, z.roll(3, 0)))
    assert abs(same) < 0.02
    assert float(cost(z, codes(12, 5))) > same + 0.1


def test_the_gradient_runs_through_the_plan_unless_it_is_detached() -> None:
    clean, found = codes(6, 0), {}
    for detached in (False, True):
        z = codes(6, 1).requires_grad_()
        made = FeatureScattering(ot_detach_plan=detached, ot_regularisation=0.2)
        (found[detached],) = torch.autograd.grad(made.transport_cost(clean, z), z)
    z = codes(6, 1).requires_grad_()
    cost = cosine_cost(clean, z)
    plan = sinkhorn(cost.detach(), 0.2, 100, 0.1)
    (expected,) = torch.autograd.grad((plan * cost).sum(), z)
    torch.testing.assert_close(found[True], expected)
    assert not torch.allclose(found[False], expected, rtol=0.05)
    h, probe = 1e-3, torch.zeros(6, 5)
    probe[2, 3] = h
    made = FeatureScattering(ot_regularisation=0.2)
    slope = (made.transport_cost(clean, codes(6, 1) + probe) - made.transport_cost(clean, codes(6, 1) - probe)) / (
        2 * h
    )
    assert float(found[False][2, 3]) == pytest.approx(float(slope), abs=2e-3)


# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_passes_and_modes_of_a_step(steps: int) -> None:
    bench, (x, y) = Bench(FeatureScattering(steps=steps)), batch()
    before = parameters(bench.f)
    with Probe(bench.f) as passes:
        bench.step(x, y)
    assert passes.frozen == [True] * (1 + steps) + [False]
    assert passes.train == [False] * (1 + steps) + [True]
    assert passes.backwards == steps + 1
    assert tracked(bench.f) == 1
    assert torch.equal(passes.inputs[0], x)
    assert moved(before, bench.f)


@pytest.mark.parametrize("options", [{}, {"ot_on": "features"}, {"ot_solver": "ipot"}, {"ot_detach_plan": True}])
def test_labels_do_not_matter_to_the_adversary(options: Any) -> None:
    crafted = []
    for shift in (0, 1):
        bench, (x, y) = Bench(FeatureScattering(**options)), batch()
        with Probe(bench.f.body["pool"]) as codes_read, Probe(bench.f) as passes:
            bench.step(x, y.roll(shift))
        crafted.append(passes.inputs[-1])
        assert len(codes_read.inputs) == 3
    assert torch.equal(crafted[0], crafted[1])


def test_every_image_of_the_batch_matters_to_every_other() -> None:
    assert FeatureScattering.batch_coupled
    gradients = []
    for last in (0, 1):
        clean, z = codes(6, 0), codes(6, 1)
        clean[-1] = clean[-1] + last
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(FeatureScattering(ot_regularisation=0.2).transport_cost(clean, z), z)
        gradients.append(gradient[0])
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("on", ["logits", "features"])
def test_the_step_goes_up_the_cost_from_a_start_that_is_not_cut(on: Any) -> None:
    bench, (x, y) = Bench(FeatureScattering(ot_on=on)), batch()
    x = (x - 0.3).clamp(0, 1)
    f = copy.deepcopy(bench.f).eval()
    read = f if on == "logits" else f.features
    start = LINF.random_start(x, generator("step", 0)).requires_grad_()
    (gradient,) = torch.autograd.grad(
        FeatureScattering(ot_on=on).transport_cost(read(x).detach(), read(start)), start
    )
    expected = start.detach() + LINF.radius * gradient.sign()
    expected = torch.minimum(torch.maximum(expected, x - LINF.radius), x + LINF.radius).clamp(0, 1)
    with Probe(bench.f.body["conv"]) as passes:
        bench.step(x, y)
    assert float(passes.inputs[1].min()) < 0
    torch.testing.assert_close(passes.inputs[1], start.detach())
    torch.testing.assert_close(passes.inputs[-1], expected)
    assert float((passes.inputs[-1] - x).abs().max()) == pytest.approx(LINF.radius, abs=1e-6)


def test_what_the_cost_is_taken_on_matters() -> None:
    crafted = {}
    for on in ("logits", "features"):
        bench, (x, y) = Bench(FeatureScattering(ot_on=on)), batch()  # type: ignore[arg-type]
        with Probe(bench.f) as passes:
            bench.step(x, y)
        crafted[on] = passes.inputs[-1]
    assert not torch.equal(crafted["logits"], crafted["features"])


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_loss_by_hand(smoothing: float) -> None:
    weight = [[1.0, -2.0], [0.0, 1.0], [0.5, 0.5]]
    bench = Bench(FeatureScattering(smoothing=smoothing), lambda: linear_network(weight))
    x, y = torch.tensor([[0.5, 0.4], [0.3, 0.6]]).view(2, 1, 1, 2), torch.tensor([0, 1])
    with Probe(bench.f) as passes:
        ((_, loss),) = bench.step(x, y)
    z = passes.inputs[-1].view(2, 2).double() @ torch.tensor(weight).double().T
    t = torch.full((2, 3), smoothing / 2).double()
    t[[0, 1], y] = 1 - smoothing
    assert loss == pytest.approx(float(-(t * z.log_softmax(1)).sum(1).mean()), rel=1e-5)


def test_no_radius_is_training_with_smoothed_labels() -> None:
    bench, (x, y) = Bench(FeatureScattering(smoothing=0.0), threat=ThreatModel("linf", 0.0)), batch()
    expected = F.cross_entropy(copy.deepcopy(bench.f).train()(x), y)
    ((_, loss),) = bench.step(x, y)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_the_published_numbers_are_the_defaults() -> None:
    chosen = FeatureScattering()
    assert (chosen.ot_regularisation, chosen.ot_iterations, chosen.ot_tolerance) == (0.01, 100, 0.1)
    assert (chosen.ot_on, chosen.ot_solver, chosen.ot_detach_plan) == ("logits", "sinkhorn", False)
    assert (chosen.steps, chosen.step_factor, chosen.smoothing) == (1, 1.0, 0.5)


def test_smoothing_beyond_uniform_is_refused() -> None:
    Bench(FeatureScattering(smoothing=0.75))
    with pytest.raises(UserError, match=r"with 4 classes, smoothing 0\.8 .* at most 0\.75"):
        Bench(FeatureScattering(smoothing=0.8))


def test_it_learns_one_batch() -> None:
    threat = ThreatModel("linf", 0.03)
    bench, (x, y) = Bench(FeatureScattering(), threat=threat, lr=0.02, optimizer=torch.optim.Adam), batch()
    losses = [bench.step(x, y)[0][1] for _ in range(200)]
    targets = torch.full((8, 4), 1 / 6).scatter(1, y[:, None], 0.5)
    floor = float(-(targets * targets.log()).sum(1).mean())
    assert losses[0] > floor + 0.15 and losses[-1] < floor + 0.05
    assert bool((bench.f.eval()(x).argmax(1) == y).all())


def test_the_cost_at_the_start_is_logged() -> None:
    bench, (x, y) = Bench(FeatureScattering()), batch()
    f, start = copy.deepcopy(bench.f).eval(), LINF.random_start(x, generator("step", 0))
    bench.step(x, y)
    expected = FeatureScattering().transport_cost(f(x), f(start)).item()
    assert float(bench.ctx.logs["transport"]) == pytest.approx(expected, rel=1e-4) and expected > 0
