"""Convolutions on small channels-last maps: the same numbers in another layout, and only where it is faster."""

from __future__ import annotations

import pytest
import torch
from quick_layers import same_gradients
from torch import Tensor, nn

from casemate.networks import small_maps
from casemate.networks.base import build_network
from casemate.networks.quick import quicken, usual
from casemate.networks.small_maps import SmallMapConv2d

LAST = torch.channels_last


def pair(bias: bool = True, stride: int = 1) -> tuple[nn.Conv2d, nn.Conv2d]:
    """(plain, fast) with the same weights, channels-last."""
    torch.manual_seed(0)
    plain, fast = (kind(6, 8, 3, stride, 1, bias=bias).to(memory_format=LAST) for kind in (nn.Conv2d, SmallMapConv2d))
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def rearranged(out: Tensor) -> bool:
    """Whether the output was made in another layout and brought back."""
    return type(out.grad_fn).__name__ == "CloneBackward0"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_output_and_gradients_are_those_of_the_plain_layer(bias: bool, stride: int) -> None:
    plain, fast = pair(bias, stride)
    x = torch.randn(3, 6, 4, 5).contiguous(memory_format=LAST).requires_grad_()
    wanted, found = plain(x), fast(x)
    assert rearranged(found) and found.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(found, wanted)
    same_gradients(plain, fast, x, wanted, found)


def test_plain_on_larger_or_contiguous_maps_in_other_types_and_under_autocast() -> None:
    plain, fast = pair()
    x = torch.randn(2, 6, 7, 7).contiguous(memory_format=LAST)
    assert not rearranged(fast(x)) and rearranged(fast(x[:, :, :6, :6]))
    assert not rearranged(fast(x[:, :, :4, :4].contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not rearranged(fast(x[:, :, :6, :6]))
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(fast))(x), plain(x))
    assert not rearranged(fast.double()(x[:, :, :6, :6].double()))


def test_only_wide_layers_change_and_can_be_changed_back() -> None:
    network = build_network("preact_resnet18", input_shape=(3, 32, 32), num_classes=10)
    changed = [name for name, part in network.named_modules() if type(part) is SmallMapConv2d]
    assert changed == [f"body.stage4.{name}" for name in ("0.conv2", "1.conv1", "1.conv2")]
    names = list(network.state_dict())
    usual(network)
    assert list(network.state_dict()) == names
    assert {type(part) for part in network.modules() if isinstance(part, nn.Conv2d)} == {nn.Conv2d}
    quicken(network)
    assert [name for name, part in network.named_modules() if type(part) is SmallMapConv2d] == changed


def test_a_network_decides_the_same_in_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = build_network("preact_resnet18", input_shape=(3, 32, 32), num_classes=10).eval().to(memory_format=LAST)
    x = torch.rand(2, 3, 32, 32).contiguous(memory_format=LAST)
    with torch.no_grad():
        found = network(x)
        monkeypatch.setattr(small_maps, "PIXELS", 0)
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)
