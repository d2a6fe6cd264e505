"""What every attack refuses, in one line, before it spends a pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from casemate.attacks.gradient import FGSM
from casemate.errors import UserError
from casemate.threat import ThreatModel, targeted, untargeted
from tests.attack_toys import Counter, digits, fresh_network, linear_system, system, trained_network

LINF = ThreatModel("linf", 0.1)
X, Y = (part[:4] for part in digits())


def attack(x: torch.Tensor = X, y: torch.Tensor = Y, threat: ThreatModel = LINF, model: nn.Module | None = None):
    network = fresh_network() if model is None else model
    return FGSM()(system(network, (1, 8, 8), 10), x, untargeted(y), threat)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (X * 2, r"go from 0 to 2: scale them to \[0, 1\]"),
        (X - 0.5, "go from -0.5 to 0.5"),
        (X.clone().fill_(torch.nan), "go from nan"),
        ((X * 255).byte(), "are uint8: divide bytes by 255"),
        (X[:, 0], r"N x 1 x 8 x 8, and got \(4, 8, 8\)"),
        (X[..., :7], r"got \(4, 1, 8, 7\)"),
        (X[:0], "the batch is empty"),
    ],
)
def test_what_is_no_batch_of_images_is_said(x: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        attack(x)


def test_a_rounding_error_outside_the_box_is_cut_off_and_one_image_is_enough() -> None:
    x = X[:1].clone()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -1e-7, 1 + 1e-7
    found = attack(x, Y[:1]).x_adv
    assert float(found.min()) >= 0 and float(found.max()) <= 1


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (torch.tensor([0, 1, 2, 10]), "labels must lie in 0 to 9: found 10"),
        (torch.tensor([0, -1, 2, 3]), "found -1"),
        (Y[:3], "labels must be 4 int64 numbers"),
        (Y.float(), "got float32"),
    ],
)
def test_labels_that_are_none_are_said(y: torch.Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        attack(y=y)


def test_targets_are_checked_too() -> None:
    face = system(fresh_network(), (1, 8, 8), 10)
    with pytest.raises(UserError, match="targets must lie in 0 to 9: found 12"):
        FGSM()(face, X, targeted(Y, torch.full_like(Y, 12)), LINF)


@pytest.mark.parametrize("radius", [0.0, -0.1, float("nan"), float("inf")])
def test_a_radius_must_be_above_nothing(radius: float) -> None:
    with pytest.raises(UserError, match="the radius must be above 0"):
        attack(threat=ThreatModel("linf", radius))


def test_a_norm_that_the_attack_does_not_know_is_said() -> None:
    class OnlyLinf(FGSM):
        norms = frozenset({"linf"})

    with pytest.raises(UserError, match="attack OnlyLinf works in linf, not in l2"):
        OnlyLinf()(
            linear_system(torch.eye(2)), torch.rand(1, 1, 1, 2), untargeted(torch.tensor([0])), ThreatModel("l2", 1.0)
        )


def test_probabilities_and_undefined_answers_are_said() -> None:
    with pytest.raises(UserError, match=r"answers with probabilities.*leave out its softmax, or take the logarithm"):
        attack(model=nn.Sequential(trained_network(), nn.Softmax(1)))
    attack(model=nn.Sequential(trained_network(), nn.LogSoftmax(1)))

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 10), torch.nan) * x.flatten(1)[:, :10]

    with pytest.raises(UserError, match="infinite or undefined logits"):
        attack(model=Broken())
    with pytest.raises(UserError, match=r"must answer with logits \(4, 10\), not \(4, 64\)"):
        attack(model=nn.Flatten())


def test_looking_at_the_answers_costs_no_pass() -> None:
    counted = Counter(trained_network())
    attack(model=counted)
    assert counted.forwards == [4, 4] and counted.gradients == [4]  # one step and the verification
