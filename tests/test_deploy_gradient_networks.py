"""The gradient graph of every registered classifier, and of torchvision's, for any batch, as ONNX too."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from casemate import registry
from casemate.deploy.gradient_graph import gradient_graph
from casemate.deploy.session import open_session
from casemate.errors import UserError
from casemate.networks.base import build_network
from tests.deploy_toys import settled

pytestmark = pytest.mark.slow

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
SHAPES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "digits_cnn": ((1, 8, 8), {}), "stl10_cnn": ((3, 96, 96), {}), "resnet18": ((3, 64, 64), {}),
    "resnet101": ((3, 64, 64), {}), "efficientnet_lite": ((3, 64, 64), {}),
    "inception_v3": ((3, 75, 75), {"side": 80}), "wrn": (CIFAR, {"depth": 10, "width": 2}), "madry_wrn": (CIFAR, {}),
    **{name: (MNIST, {}) for name in ("lenet5", "small_cnn", "madry_cnn", "fast_cnn", "er_conv")},
}  # fmt: skip
"""Smaller or other images than the first of `USUAL` that the network takes."""
USUAL = (CIFAR, MNIST, (1, 8, 8), (3, 64, 64))


def example(name: str) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """An image shape that a network takes, and options."""
    for shape in () if name in SHAPES else USUAL:
        with contextlib.suppress(UserError, RuntimeError):
            build_network(name, input_shape=shape, num_classes=10).eval()(images(1, shape))
            return shape, {}
    return SHAPES[name]


def images(n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(n))


def first(logits: Tensor) -> Tensor:
    return logits[:, 0]


def cosines(net: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """With the gradient of autograd in float64: float32's own sums decide the sign of activations near 0."""
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(net.double()(exact)[:, 0].sum(), exact)
    net.float()
    return nn.functional.cosine_similarity(gradient.detach().double().flatten(1), expected.flatten(1))


@pytest.mark.parametrize("name", registry.names("network"))
def test_every_registered_classifier(name: str) -> None:
    shape, options = example(name)
    torch.manual_seed(0)
    net = build_network(name, input_shape=shape, num_classes=10, **options)
    settled(net, shape[0], shape[1])
    for part in net.head.modules():
        if isinstance(part, nn.Linear):
            part.weight.data.normal_(std=0.1)  # some begin with zeros, and no gradient
    graph = gradient_graph(net, first, images(2, shape))  # which compares it with autograd, value by value
    for n in (1, 3):
        gradient, value, outputs = graph(images(n, shape))
        assert gradient.shape == (n, *shape) and value.shape == (n,) and outputs.shape == (n, 10)
        assert float(cosines(net, images(n, shape), gradient).min()) > 0.99
    with torch.inference_mode():
        graph(images(4, shape))  # no autograd


@pytest.mark.parametrize(
    ("name", "side"),
    [("resnet18", 64), pytest.param("resnet101", 64, marks=pytest.mark.full),
     pytest.param("inception_v3", 75, marks=pytest.mark.full)],
)  # fmt: skip
def test_torchvisions_networks_by_the_example_file(name: str, side: int, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "saliency.py"
    command = [sys.executable, str(example), "--network", name, "--side", str(side), "--out", "a.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"batch (\d): value \S+, cosine with autograd (\S+)", done.stdout)
    assert [batch for batch, _ in found] == ["1", "3"]
    assert all(float(cosine) > 0.99 for _, cosine in found)
    session = open_session(tmp_path / "a.onnx", "cpu")
    assert session.get_inputs()[0].shape == ["batch", 3, side, side]


def test_the_example_says_that_there_is_no_such_network(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "saliency.py"
    command = [sys.executable, str(example), "--network", "resnet19"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --network resnet19: torchvision.models has none; try resnet1")
