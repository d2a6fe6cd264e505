from __future__ import annotations

import math

import pytest
import torch

from casemate.errors import UserError
from casemate.objectives import capped_margin, cross_entropy, margin, objective
from casemate.threat import targeted, untargeted

LOGITS = torch.tensor([[1.0, 3.0, -2.0], [0.0, 0.0, 0.0]])
PLAIN = untargeted(torch.tensor([0, 2]))
AIMED = targeted(torch.tensor([0, 2]), torch.tensor([1, 0]))


def test_cross_entropy_of_the_label_and_minus_that_of_the_target() -> None:
    total = math.log(math.e + math.e**3 + math.e**-2)
    assert torch.allclose(cross_entropy(LOGITS, PLAIN), torch.tensor([total - 1, math.log(3)]))
    assert torch.allclose(cross_entropy(LOGITS, AIMED), torch.tensor([3 - total, -math.log(3)]))


def test_margin_is_positive_exactly_where_the_goal_is_reached() -> None:
    assert margin(LOGITS, PLAIN).tolist() == [2.0, 0.0]
    assert margin(LOGITS, AIMED).tolist() == [2.0, 0.0]
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(1))
    for goal in (untargeted(labels), targeted((labels + 1) % 5, labels)):
        assert torch.equal(margin(logits, goal) > 0, goal.reached(logits.argmax(1)))


def test_margin_ignores_a_shift_of_all_logits_and_scales_with_them() -> None:
    assert torch.allclose(margin(LOGITS + 7, PLAIN), margin(LOGITS, PLAIN))
    assert torch.allclose(margin(3 * LOGITS, PLAIN), 3 * margin(LOGITS, PLAIN))


def test_the_cap_closes_at_kappa() -> None:
    leaf = torch.tensor([[1.0, 3.0], [2.0, 1.0]], requires_grad=True)
    values = capped_margin(1.0)(leaf, untargeted(torch.tensor([0, 0])))
    assert values.tolist() == [1.0, -1.0]
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_values_are_per_sample() -> None:
    for name in ("ce", "margin"):
        both = objective(name)(LOGITS, PLAIN)
        assert both.shape == (2,)
        assert torch.equal(both[:1], objective(name)(LOGITS[:1], PLAIN[torch.tensor([0])]))


def test_an_unknown_objective_is_named_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"'margins'; did you mean 'margin'\?"):
        objective("margins")


def test_dlr_ignores_shift_and_scale_of_the_logits_and_cross_entropy_does_not() -> None:
    """ATTACKS 12.2, oracle 3, for both forms of the DLR."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(6) % 5
    for goal in (untargeted(labels), targeted(labels, (labels + 2) % 5)):
        moved = 40.0 * logits + torch.linspace(-3, 3, 6).double()[:, None]
        torch.testing.assert_close(objective("dlr")(moved, goal), objective("dlr")(logits, goal))
        assert not torch.allclose(cross_entropy(40.0 * logits, goal), cross_entropy(logits, goal))
        assert not torch.allclose(margin(40.0 * logits, goal), margin(logits, goal))
