"""The fast input gradient of convolutions with few input channels: the same numbers, in every use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quick_layers import same_gradients
from torch import Tensor, nn

from casemate.networks import shallow
from casemate.networks.base import build_network
from casemate.networks.quick import quicken
from casemate.networks.shallow import ShallowConv2d, _Blocked, block_of

LAYERS: list[tuple[dict[str, Any], tuple[int, int], int | None]] = [
    ({"in_channels": 1, "kernel_size": 5, "padding": 2}, (28, 28), 4),
    ({"in_channels": 1, "kernel_size": 3}, (28, 28), 4),
    ({"in_channels": 1, "kernel_size": 3}, (8, 12), 4),
    ({"in_channels": 1, "kernel_size": 4, "stride": 2, "padding": 1}, (28, 28), 4),
    ({"in_channels": 3, "kernel_size": 3, "padding": 1}, (32, 32), 2),
    ({"in_channels": 3, "kernel_size": 4, "stride": 2, "padding": 1}, (32, 32), 2),
    ({"in_channels": 3, "kernel_size": 1}, (6, 6), 2),
    ({"in_channels": 3, "kernel_size": 3, "padding": 1}, (7, 32), None),
    ({"in_channels": 6, "kernel_size": 5}, (14, 14), None),
    ({"in_channels": 3, "kernel_size": 7, "stride": 3, "padding": 3}, (24, 24), None),
    ({"in_channels": 2, "kernel_size": 3, "groups": 2}, (8, 8), None),
    ({"in_channels": 1, "kernel_size": 3, "dilation": 2}, (8, 8), None),
    ({"in_channels": 1, "kernel_size": 3, "padding": "same"}, (8, 8), None),
    ({"in_channels": 1, "kernel_size": (3, 5), "padding": (1, 2)}, (8, 8), None),
    ({"in_channels": 1, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (8, 8), None),
    ({"in_channels": 1, "kernel_size": 3, "padding": 5}, (8, 8), None),
]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow, "PIXELS", 1)


def pair(options: dict[str, Any], *, bias: bool = True) -> tuple[nn.Conv2d, nn.Conv2d]:
    """(plain, fast) with the same weights."""
    torch.manual_seed(0)
    plain = nn.Conv2d(out_channels=4, bias=bias, **options)
    fast = ShallowConv2d(out_channels=4, bias=bias, **options)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


@pytest.mark.parametrize(("options", "size", "block"), LAYERS)
def test_the_gradient_is_that_of_the_plain_layer(
    options: dict[str, Any], size: tuple[int, int], block: int | None
) -> None:
    plain, fast = pair(options)
    assert block_of(fast, size) == block
    x = torch.rand(5, options["in_channels"], *size, requires_grad=True)
    wanted, found = plain(x), fast(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert (type(found.grad_fn).__name__ == "_BlockedBackward") == (block is not None)
    same_gradients(plain, fast, x, wanted, found)


def test_every_tap_and_the_second_derivative_by_finite_differences() -> None:
    torch.manual_seed(0)
    for stride, padding, block, size in ((1, 2, 4, 4), (1, 0, 2, 6), (2, 1, 2, 4)):
        kernel = 5 if padding == 2 else 4 if stride == 2 else 3
        x = torch.rand(2, 1, size, size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

        def run(*given: Tensor, numbers: tuple[int, int, int] = (stride, padding, block)) -> Tensor:
            made: Tensor = _Blocked.apply(*given, *numbers)
            return made

        assert torch.autograd.gradcheck(run, (x, weight, bias))
        assert torch.autograd.gradgradcheck(run, (x, weight, bias))


def test_plain_where_it_does_not_pay() -> None:
    _, fast = pair({"in_channels": 1, "kernel_size": 3})
    x = torch.rand(2, 1, 8, 8)
    for given in (x, x.double().requires_grad_()):
        out = fast.to(given.dtype)(given)
        assert "Blocked" not in type(out.grad_fn).__name__
    fast.float()
    with torch.no_grad():
        assert fast(x.requires_grad_()).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert "Blocked" not in type(fast(x).grad_fn).__name__


def test_autocast_around_the_backward_pass_alone_changes_nothing() -> None:
    plain, fast = pair({"in_channels": 1, "kernel_size": 3})
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    found = []
    for layer in (plain, fast):
        out = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            found += torch.autograd.grad(out, x)
    torch.testing.assert_close(found[1], found[0])


def test_gradients_of_each_image_by_vmap_and_images_without_a_batch() -> None:
    plain, fast = pair({"in_channels": 1, "kernel_size": 3})
    x = torch.rand(3, 1, 1, 8, 8)
    each = [
        torch.func.vmap(torch.func.grad(lambda at, layer=layer: layer(at).square().sum()))(x)
        for layer in (plain, fast)
    ]
    torch.testing.assert_close(each[1], each[0])
    alone = x[0, 0].clone().requires_grad_()
    torch.testing.assert_close(fast(alone), plain(alone))


def test_a_small_batch_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow, "PIXELS", 200)
    _, fast = pair({"in_channels": 1, "kernel_size": 3})
    names = [type(fast(torch.rand(n, 1, 8, 8, requires_grad=True)).grad_fn).__name__ for n in (3, 4)]
    assert "Blocked" not in names[0] and "Blocked" in names[1]


def test_torch_fx_traces_the_plain_layer() -> None:
    plain, fast = pair({"in_channels": 1, "kernel_size": 3})
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(fast))(x), plain(x))


def test_a_network_keeps_its_weights_and_names_and_only_its_narrow_layers_change() -> None:
    torch.manual_seed(0)
    network = build_network("lenet5", input_shape=(1, 28, 28), num_classes=10)
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert kinds == [ShallowConv2d, nn.Conv2d, nn.Conv2d]
    assert [n for n, _ in network.named_parameters()][:2] == ["body.conv1.0.weight", "body.conv1.0.bias"]
    torch.manual_seed(0)
    first = nn.Conv2d(1, 6, 5, padding=2)
    assert torch.equal(first.weight, network.body["conv1"][0].weight)  # type: ignore[index]


def test_a_layer_that_is_more_than_a_convolution_is_left_alone() -> None:
    class Own(nn.Conv2d):
        pass

    layers = nn.Sequential(Own(1, 4, 3), nn.Conv2d(1, 4, 3))
    quicken(layers)
    assert [type(m) for m in layers] == [Own, ShallowConv2d]


def test_weights_without_an_input_gradient_and_frozen_weights() -> None:
    plain, fast = pair({"in_channels": 1, "kernel_size": 3}, bias=False)
    x = torch.rand(3, 1, 8, 8)
    fast(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad)
    fast.requires_grad_(False)
    fast.weight.grad = None
    x.requires_grad_()
    fast(x).square().sum().backward()
    assert fast.weight.grad is None and x.grad is not None
    copy = x.detach().clone().requires_grad_()
    plain(copy).square().sum().backward()
    torch.testing.assert_close(x.grad, copy.grad)
