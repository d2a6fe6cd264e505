"""The fast input gradient of batch norms in eval mode: the same numbers, and only where it is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from casemate.networks.base import build_network
from casemate.networks.frozen_norm import FrozenNorm2d, _Scaled
from casemate.networks.quick import quicken


def pair(*, affine: bool = True) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """(plain, fast) in eval mode with the same weights, frozen, none of them neutral."""
    torch.manual_seed(0)
    plain, fast = nn.BatchNorm2d(3, affine=affine), FrozenNorm2d(3, affine=affine)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.2, 2)
    fast.load_state_dict(plain.state_dict())
    return plain.eval().requires_grad_(False), fast.eval().requires_grad_(False)


def backward_of(out: Tensor) -> str:
    return type(out.grad_fn).__name__


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_are_those_of_the_plain_layer(affine: bool, layout: torch.memory_format) -> None:
    plain, fast = pair(affine=affine)
    x = torch.randn(4, 3, 5, 6).contiguous(memory_format=layout).requires_grad_()
    wanted, found = plain(x), fast(x)
    assert backward_of(found) == "_ScaledBackward"
    assert torch.equal(found, wanted)
    slope = torch.randn_like(wanted)
    (a,), (b,) = torch.autograd.grad(wanted, x, slope), torch.autograd.grad(found, x, slope)
    torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_first_and_second_derivative_by_finite_differences() -> None:
    _, fast = pair()
    fast.double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    constants = (fast.running_mean, fast.running_var, fast.weight, fast.bias, fast.eps)

    def run(at: Tensor) -> Tensor:
        made: Tensor = _Scaled.apply(at, *constants)
        return made

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))
    curved = torch.autograd.functional.hessian(lambda at: run(at).pow(3).sum(), x.detach())
    wanted = torch.autograd.functional.hessian(lambda at: fast(at).pow(3).sum(), x.detach())
    torch.testing.assert_close(curved, wanted)


def test_weights_that_learn_get_their_gradients() -> None:
    plain, fast = pair()
    for layer in (plain, fast):
        layer.weight.requires_grad_()
        layer(torch.ones(2, 3, 4, 4, requires_grad=True)).square().sum().backward()
    assert plain.weight.grad is not None and bool(plain.weight.grad.abs().sum() > 0)
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad)


def test_train_mode_moves_the_statistics_as_before() -> None:
    plain, fast = pair()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    outs = [layer.train()(x) for layer in (plain, fast)]
    assert "Scaled" not in backward_of(outs[1])
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(fast.running_mean, plain.running_mean)
    assert fast.num_batches_tracked == plain.num_batches_tracked


def test_plain_where_no_gradient_is_wanted_in_other_types_and_under_autocast() -> None:
    _, fast = pair()
    x = torch.randn(2, 3, 4, 4)
    assert fast(x).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert "Scaled" not in backward_of(fast(x.requires_grad_()))
    assert "Scaled" not in backward_of(fast.double()(x.detach().double().requires_grad_()))
    with pytest.raises(ValueError, match="expected 4D input"):
        fast(torch.zeros(2, 3, dtype=torch.float64))


def test_gradients_of_each_image_by_vmap() -> None:
    plain, fast = pair()
    x = torch.randn(3, 1, 3, 4, 4)
    each = [
        torch.func.vmap(torch.func.grad(lambda at, layer=layer: layer(at).pow(3).sum()))(x) for layer in (plain, fast)
    ]
    torch.testing.assert_close(each[1], each[0])


def test_torch_fx_traces_the_plain_layer() -> None:
    plain, fast = pair()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(fast).eval())(x), plain(x))


def test_a_network_keeps_its_names_and_a_norm_that_is_more_is_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        pass

    network = build_network("resnet20", input_shape=(3, 32, 32), num_classes=10)
    assert {type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {FrozenNorm2d}
    layers = nn.Sequential(Own(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    names = list(layers.state_dict())
    quicken(layers)
    assert [type(m) for m in layers] == [Own, FrozenNorm2d, nn.BatchNorm2d]
    assert list(layers.state_dict()) == names
