"""The gradient graph equals autograd: many layers, both convolution modes, any batch. It names what it cannot do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.deploy.fold import forward_graph
from casemate.deploy.gradient_graph import _compare, gradient_graph
from casemate.deploy.session import open_session
from casemate.errors import UserError
from tests.deploy_toys import Block, PreAct, settled


def images(n: int, *shape: int) -> Tensor:
    return torch.rand(n, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(n))


def autograd(module: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[:, 0].sum(), x)
    return gradient


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


def first(outputs: Tensor) -> Tensor:
    return outputs[:, 0]


LENET = nn.Sequential(
    nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 4), nn.ReLU(), nn.Flatten(),
    nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10),
)  # fmt: skip
RESNET = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
PREACT = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), PreAct(), PreAct(), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
    nn.Linear(8, 10),
)  # fmt: skip


@pytest.mark.parametrize("conv", ["auto", "transpose", "flip"])
@pytest.mark.parametrize("net", [LENET, RESNET, PREACT], ids=["lenet", "resnet", "preact"])
def test_it_equals_autograd_for_any_batch(net: nn.Module, conv: str) -> None:
    net = settled(net)
    graph = gradient_graph(net, first, images(2), conv=conv)  # type: ignore[arg-type]
    for n in (1, 2, 7, 8):
        gradient, value, outputs = graph(images(n))
        assert_close(gradient, autograd(net, images(n)))
        torch.testing.assert_close(outputs, net(images(n)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value, net(images(n))[:, 0], rtol=1e-5, atol=1e-5)


def layers(*middle: nn.Module, flat: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *middle, nn.Flatten(), nn.Linear(flat, 3))


ACTIVATIONS = [
    nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.1), nn.ELU(), nn.Hardswish(),
    nn.ReLU6(), nn.Mish(), nn.LogSigmoid(), nn.PReLU(), nn.Threshold(0.1, 0.0), nn.Threshold(0.0, -1.0),
]  # fmt: skip
POOLS = {
    "max": (nn.MaxPool2d(2), 128), "max overlapping": (nn.MaxPool2d(3, 2, 1), 128), "max 3": (nn.MaxPool2d(3), 32),
    "max ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), 128), "max dilated": (nn.MaxPool2d(2, 1, dilation=2), 288),
    "mean": (nn.AvgPool2d(2), 128), "mean overlapping": (nn.AvgPool2d(3, 2, 1), 128),
    "mean without pad": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 128), "mean whole": (nn.AvgPool2d(8), 8),
    "adaptive": (nn.AdaptiveAvgPool2d(4), 128), "global": (nn.AdaptiveAvgPool2d(1), 8),
}  # fmt: skip
CONVOLUTIONS = {
    "strided": (nn.Conv2d(8, 8, 3, 2, 1), 128), "even kernel": (nn.Conv2d(8, 8, 4, 2), 72),
    "rest": (nn.Conv2d(8, 4, 3, 3), 16), "dilated": (nn.Conv2d(8, 8, 3, padding=2, dilation=2), 512),
    "grouped": (nn.Conv2d(8, 16, 3, padding=1, groups=4), 1024), "oblong": (nn.Conv2d(8, 8, (1, 3), (2, 1)), 192),
    "wide pad": (nn.Conv2d(8, 8, 1, padding=2), 1152), "whole": (nn.Conv2d(8, 16, 8), 16),
}  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: str(a))
def test_activations(activation: nn.Module) -> None:
    net = layers(activation, flat=512).eval()
    gradient = gradient_graph(net, first, images(2))(images(3))[0]
    assert_close(gradient, autograd(net, images(3)))


@pytest.mark.parametrize(
    ("name", "pool"),
    [(name, pool) for name in POOLS for pool in ("auto", "scatter", "mask") if pool == "auto" or name[:3] == "max"],
)
def test_pooling_with_ties(name: str, pool: str) -> None:
    layer, flat = POOLS[name]
    net = layers(nn.ReLU(), layer, flat=flat).eval()
    x = images(3)
    x[0], x[1, :, 2:6, 2:6] = 0.5, 0.25  # flat areas: every window holds equal values
    gradient = gradient_graph(net, first, images(2), pool=pool)(x)[0]  # type: ignore[arg-type]
    assert_close(gradient, autograd(net, x))


@pytest.mark.parametrize("conv", ["auto", "transpose", "flip"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, conv: str) -> None:
    layer, flat = CONVOLUTIONS[name]
    net = layers(nn.SiLU(), layer, flat=flat).eval()
    gradient = gradient_graph(net, first, images(2), conv=conv)(images(3))[0]  # type: ignore[arg-type]
    assert_close(gradient, autograd(net, images(3)))


class Odd(nn.Module):
    """Slices with and without a step, a selection, a concatenation, a layer normalisation and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, 1:7:3], x[:, :, -2:], x[:, :, ::4, 1:] @ x.new_ones(7, 8)], 2)
        return self.head(self.norm(x[:, 0].mean(1))).log_softmax(1)


def test_slices_selections_and_normalised_exponentials() -> None:
    net = Odd().eval()
    gradient = gradient_graph(net, first, images(2))(images(3))[0]
    assert_close(gradient, autograd(net, images(3)))


def test_it_calls_no_autograd_and_shares_the_weights() -> None:
    net = settled(LENET)
    graph = gradient_graph(net, first, images(2))
    with torch.inference_mode():
        graph(images(2))
    shared = {p.data_ptr() for p in net.parameters()}
    assert {p.data_ptr() for p in graph.parameters()} <= shared
    assert all(p.requires_grad for p in net.parameters())


def test_the_batch_does_not_mix_the_samples() -> None:
    graph = gradient_graph(settled(RESNET), first, images(2))
    together = graph(images(5))[0]
    for at in range(5):
        assert_close(graph(images(5)[at : at + 1])[0][0], together[at])


def test_a_batch_as_large_as_a_map_side_is_not_taken_for_it() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1))
    graph = gradient_graph(net, first, torch.rand(2, 1, 2, 2))
    assert graph(torch.rand(6, 1, 2, 2))[0].shape == (6, 1, 2, 2)


class Foreign(nn.Module):
    def __init__(self, call: object) -> None:
        super().__init__()
        self.call, self.head = call, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(x).flatten(1))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: F.grid_sample(x, x.view(-1, 8, 8, 1).expand(-1, 8, 8, 2), align_corners=False),
            "grid_sampler_2d_back",
        ),
        (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True).repeat(1, 4, 1, 1), "ceil_mode"),
        (lambda x: F.adaptive_avg_pool2d(x, 3).sum((2, 3)).expand(-1, 64), "uneven"),
        (lambda x: F.conv_transpose2d(x, torch.ones(1, 1, 1, 1)), "transposed"),
        (lambda x: x.round(), "does not depend on the input"),
        (lambda x: x.detach(), "does not depend on the input"),
        (lambda x: x if float(x.detach().sum()) > 0 else -x, "cannot be traced"),
        (lambda x: x * len(x), "batch size"),
    ],
)
def test_what_it_cannot_do_is_named(call: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        gradient_graph(Foreign(call), first, images(2))
    assert "\n" not in str(caught.value)


def test_a_wrong_gradient_is_an_error_and_a_flipped_unit_is_not() -> None:
    """A unit that rounding turns over is autograd's own doing; a wrong sign anywhere else is not."""
    x = images(3)
    smooth = torch.ones_like(x)
    _compare(smooth, smooth + 1e-5, lambda at: smooth + 1e-5, x)
    off = smooth.clone()
    off[0, 0, 2, 2] = 1.01
    with pytest.raises(UserError, match=r"differs from autograd by 0\.01"):
        _compare(off, smooth, lambda at: smooth, x)

    def kinked(at: Tensor) -> Tensor:  # jumps by as much as the sample's rounding
        return smooth + 0.01 * (at != x)

    _compare(off, smooth, kinked, x)
    with pytest.raises(UserError, match="differs from autograd by 2"):
        _compare(-smooth, smooth, lambda at: smooth + 5 * (at != x), x)


def test_an_objective_must_be_per_sample() -> None:
    with pytest.raises(UserError, match="one value per sample"):
        gradient_graph(LENET, lambda outputs: outputs, images(2))


@pytest.mark.parametrize("net", [RESNET, PREACT], ids=["resnet", "preact"])
def test_folding_leaves_no_batch_norm_and_the_same_function(net: nn.Module) -> None:
    net = settled(net)
    graph = forward_graph(net, images(2))
    with torch.no_grad():
        torch.testing.assert_close(graph(images(9)), net(images(9)), rtol=1e-5, atol=1e-5)
    called = [str(node.target) for node in graph.graph.nodes]
    after_pooling = 1 if net is PREACT else 0  # nothing with weights reads it, so it stays
    assert len([name for name in called if "batch_norm" in name]) == after_pooling
    assert not [name for name in called if "slice" in name]


def test_a_negative_scale_is_not_moved_through_a_relu() -> None:
    net = settled(PREACT)
    norm = net[1].norm
    norm.weight.data[3] = -0.7
    graph = forward_graph(net, images(2))
    with torch.no_grad():
        torch.testing.assert_close(graph(images(9)), net(images(9)), rtol=1e-5, atol=1e-5)
    assert "batch_norm" in str(graph.graph)
    gradient = gradient_graph(graph, first, images(2))(images(3))[0]
    assert_close(gradient, autograd(net, images(3)))


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "gradient_graph.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    session = open_session(tmp_path / "saliency.onnx", "cpu")
    x = images(4)
    assert [value.shape for value in session.run(None, {"image": x.numpy()})] == [(4, 1, 8, 8), (4,), (4, 10)]
