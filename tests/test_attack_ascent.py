from __future__ import annotations

import pytest
import torch
from attack_toys import Counter, fresh_network
from torch import Tensor

from casemate.attacks.ascent import ascend, l2_step, sign_step
from casemate.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)
W = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)


def slope(x: Tensor) -> Tensor:
    return (x * W).flatten(1).sum(1)


def test_on_a_slope_it_reaches_the_corner_of_the_linf_ball_and_the_edge_of_the_box() -> None:
    x = torch.tensor([[0.5, 0.5], [0.95, 0.05]]).view(2, 1, 1, 2)
    out = ascend(slope, x, x, LINF, steps=4, step_size=0.03)
    assert torch.allclose(out.flatten(1), torch.tensor([[0.6, 0.4], [1.0, 0.0]]))
    assert not out.requires_grad


def test_on_a_slope_it_reaches_the_point_of_the_l2_ball_along_the_gradient() -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    out = ascend(slope, x, x, L2, steps=7, step_size=0.1, direction=l2_step)
    assert torch.allclose(out.flatten(), torch.tensor([0.8, 0.1]), atol=1e-6)


def test_no_steps_return_the_projected_start() -> None:
    x = torch.full((1, 1, 1, 2), 0.5)
    assert torch.allclose(ascend(slope, x, x + 0.3, LINF, steps=0, step_size=1.0), x + 0.1)


def test_the_start_is_used_as_it_is() -> None:
    seen: list[Tensor] = []

    def watch(at: Tensor) -> Tensor:
        seen.append(at.detach().clone())
        return slope(at)

    x = torch.full((1, 1, 1, 2), 0.5)
    ascend(watch, x, x + 0.3, LINF, steps=2, step_size=0.05)
    assert torch.allclose(seen[0], x + 0.3) and LINF.contains(seen[1], x).all()


def test_values_are_summed_so_a_sample_does_not_feel_its_batch() -> None:
    network, x = fresh_network(), torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6)

    def loss(rows: Tensor):  # type: ignore[no-untyped-def]
        return lambda at: torch.nn.functional.cross_entropy(network(at), y[rows], reduction="none")

    together = ascend(loss(torch.arange(6)), x, x, L2, steps=3, step_size=0.2, direction=l2_step)
    alone = ascend(loss(torch.tensor([4])), x[4:5], x[4:5], L2, steps=3, step_size=0.2, direction=l2_step)
    assert torch.allclose(together[4:5], alone, atol=1e-6)


def test_it_costs_its_steps_and_leaves_the_model_alone() -> None:
    network = fresh_network().train()
    paid: list[Tensor] = []
    for parameter in network.parameters():
        parameter.register_hook(paid.append)
    counter = Counter(network)
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():  # crafting inside a caller's no_grad still works
        ascend(lambda at: counter(at).logsumexp(1), x, x, LINF, steps=4, step_size=0.05)
    assert counter.forwards == counter.gradients == [3] * 4
    assert not paid and all(p.grad is None and p.requires_grad for p in network.parameters())
    assert network.training


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_the_memory_format_is_kept_and_the_inputs_are_not_written(threat: ThreatModel) -> None:
    x = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    start = threat.random_start(x, torch.Generator().manual_seed(0))
    before = x.clone(), start.clone()
    out = ascend(lambda at: at.square().flatten(1).sum(1), x, start, threat, steps=2, step_size=0.05)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before[0]) and torch.equal(start, before[1])


def test_steps_do_not_depend_on_the_size_of_the_gradient_and_zero_stays_zero() -> None:
    gradient = torch.zeros(3, 1, 1, 2)
    gradient[0] = torch.tensor([3e-30, -4e-30])
    gradient[1] = torch.tensor([3e20, -4e20])
    expected = torch.tensor([[0.6, -0.8], [0.6, -0.8], [0.0, 0.0]])
    assert torch.allclose(l2_step(gradient).flatten(1), expected)
    assert sign_step(gradient).flatten(1).tolist() == [[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]]
