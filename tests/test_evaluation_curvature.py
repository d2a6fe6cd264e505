"""The dominant eigenvalue of the loss's Hessian: against closed forms, and one way against the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_toys import digits as toy_digits
from attack_toys import trained_network
from torch import Tensor, nn

from casemate.data import Loaded
from casemate.evaluation.curvature import dominant_eigenvalue, figures
from casemate.evaluation.external import ExternalSystem
from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.ledger import Ledger
from casemate.evaluation.plan import Runner
from casemate.networks.base import build_network
from casemate.system import TorchSystem, View
from casemate.threat import ThreatModel, untargeted


def face(model: nn.Module, shape: tuple[int, int, int], classes: int) -> View:
    return TorchSystem(model, input_shape=shape, num_classes=classes).views()["adaptive"]


def by_classes(view: View, x: Tensor) -> Tensor:
    """(N,) the largest eigenvalue, exact where the logits are piecewise linear in the image: the Hessian is J^T A J
    with J the logits' Jacobian and A = diag(p) - p p^T, and A^(1/2) J J^T A^(1/2) has the same one."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        logits = view.logits(leaf)
        slopes = [
            torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0].flatten(1)
            for c in range(logits.shape[1])
        ]
    jacobian, p = torch.stack(slopes, dim=1).double(), logits.detach().double().softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    root = vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.mT
    found: Tensor = torch.linalg.eigvalsh(root @ (jacobian @ jacobian.mT) @ root)[:, -1]
    return found


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_a_linear_softmax_model_has_the_hessian_of_the_textbook() -> None:
    """H = W^T (diag p - p p^T) W (ATTACKS 12.2, oracle 12)."""
    model = Linear()
    x = torch.rand(7, 1, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    view, goal = face(model, (1, 3, 4), 5), untargeted(torch.arange(7) % 5)
    p = model(x).softmax(1).detach()
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    wanted = torch.linalg.eigvalsh(model.weight.detach().T @ spread @ model.weight.detach())[:, -1]
    torch.testing.assert_close(by_classes(view, x), wanted)
    torch.testing.assert_close(dominant_eigenvalue(view, x, goal), wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["digits_cnn", "compact_resnet"])
def test_both_ways_agree_on_networks(name: str) -> None:
    x, y = toy_digits()
    torch.manual_seed(0)
    model = build_network(name, input_shape=(1, 8, 8), num_classes=10)
    model = copy.deepcopy(trained_network()) if name == "digits_cnn" else model
    view = face(model.eval().requires_grad_(False).double(), (1, 8, 8), 10)
    images, goal = x[:12].double(), untargeted(y[:12])
    exact, iterated = by_classes(view, images), dominant_eigenvalue(view, images, goal)
    assert (exact >= 0).all() and exact.max() > 1e-6
    bent = exact > 1e-3 * exact.max()
    torch.testing.assert_close(iterated[bent], exact[bent], rtol=0.02, atol=0)


def test_a_flat_system_and_logits_that_bend() -> None:
    class Quadratic(nn.Module):
        """Two logits, 0 and -|x|^2: the loss of class 0 bends downwards where p is one half."""

        def forward(self, x: Tensor) -> Tensor:
            square = x.flatten(1).square().sum(1)
            return torch.stack([torch.zeros_like(square), -square], dim=1)

    x = torch.zeros(2, 1, 2, 2)
    view = face(Quadratic(), (1, 2, 2), 2)
    # at 0: the gradient of the loss is 2 p_1 x = 0, and its Hessian -2 p_1 = -1 for label 0, 2 p_0 = 1 for label 1
    torch.testing.assert_close(
        dominant_eigenvalue(view, x, untargeted(torch.tensor([0, 1]))), torch.tensor([-1.0, 1])
    )
    flat = face(nn.Sequential(nn.Flatten(), nn.Linear(4, 2).requires_grad_(False)), (1, 2, 2), 2)
    flat_weight = torch.zeros(2, 4)
    torch.nn.utils.vector_to_parameters(torch.cat([flat_weight.flatten(), torch.zeros(2)]), _parameters(flat))
    assert dominant_eigenvalue(flat, x, untargeted(torch.tensor([0, 1]))).tolist() == [0.0, 0.0]


def _parameters(view: View) -> list[nn.Parameter]:
    assert isinstance(view.logits, nn.Module)
    return list(view.logits.parameters())


def test_images_do_not_depend_on_one_another() -> None:
    x, y = toy_digits()
    view = face(trained_network(), (1, 8, 8), 10)
    exact = by_classes(view, x[:6]).float()
    together = dominant_eigenvalue(view, x[:6], untargeted(y[:6]))
    torch.testing.assert_close(together, exact, rtol=0.02, atol=1e-3 * float(exact.max()))


def test_a_model_of_somebody_else_and_one_without_second_derivatives(
    digits: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *slopes: Tensor) -> Tensor:
            return slopes[0]

    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(Once.apply(x))  # type: ignore[no-any-return]

    runner = Runner(Ledger(tmp_path, 20), EvaluationSet(digits.test), ThreatModel("linf", 0.1))
    for model, known in ((trained_network(), True), (Guarded(), False)):
        brought = ExternalSystem(model, input_shape=(1, 8, 8), device="cpu", name="mine")
        assert (figures(brought, runner, 20) is not None) is known
        assert ("mine: the curvature is left out: " in caplog.text) is not known


def test_figures_are_of_the_images_that_are_right(digits: Loaded, tmp_path: Path) -> None:
    system = TorchSystem(trained_network(), input_shape=(1, 8, 8), num_classes=10)
    runner = Runner(Ledger(tmp_path, 20), EvaluationSet(digits.test), ThreatModel("linf", 0.1))
    x, y = runner.data.take(runner.order(50))
    right = system.decide(x) == y
    values = dominant_eigenvalue(system.views()["static"], x[right], untargeted(y[right])).numpy()
    found = figures(system, runner, 50)
    assert found is not None and found["n"] == int(right.sum()) > 40
    assert found["median"] == pytest.approx(float(np.median(values)), rel=1e-3)
    assert found["mean"] == pytest.approx(float(values.mean()), rel=1e-3)
    system.stochastic = True
    assert figures(system, runner, 50) is None
