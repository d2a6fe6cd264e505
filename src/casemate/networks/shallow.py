"""Convolutions of few input channels, with an input gradient that is fast on a CPU.

The input gradient of a convolution is itself a convolution, to `in_channels` channels: with one to four of them most
lanes of a vector register are empty, and on LeNet-5 it took more than a quarter of an attack step. Here the gradients
of a block of b x b pixels are the channels of one convolution of stride b, and are put in place afterwards: a larger
kernel, full lanes, and the same numbers but for the order of the sums.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.networks.blocks import float32_on_cpu

LANES = 16
"""At most so many channels are made of a block, one register of float32: beyond, the larger kernel costs more than
the lanes save."""
PIXELS = 20_000
"""Smallest batch, in pixels of a channel: below, making the kernel costs more than it saves."""


def block_of(layer: nn.Conv2d, size: tuple[int, ...]) -> int | None:
    """Side of the blocks for images of this height and width; None where the fast form does not fit."""
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    square = all(not isinstance(v, str) and v[0] == v[1] for v in (layer.kernel_size, layer.stride, layer.padding))
    if not plain or not square:
        return None
    stride = layer.stride[0]
    for block in (4, 2):
        fits = block % stride == 0 and not size[0] % block and not size[1] % block
        if fits and layer.in_channels * block**2 <= LANES and _same_size(layer, block, size):
            return block
    return None


def _same_size(layer: nn.Conv2d, block: int, size: tuple[int, ...]) -> bool:
    """Whether the blocked convolution, padded alike on all sides, returns exactly the blocks of the image."""
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    first, taps = _reach(kernel, stride, padding, block)
    outputs = [(length + 2 * padding - kernel) // stride + 1 for length in size]
    made = [(out - 2 * first - len(taps[0])) // (block // stride) + 1 for out in outputs]
    return first <= 0 and made == [length // block for length in size]


@lru_cache(maxsize=64)
def _reach(kernel: int, stride: int, padding: int, block: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(position of the first output that a block's pixels touch, the kernel's tap for each pixel and output).

    Pixel i meets output o through tap i + padding - stride * o. A tap outside the kernel is given as `kernel`.
    """
    first = -((kernel - 1 - padding) // stride)
    last = (block - 1 + padding) // stride
    taps = [[r + padding - stride * o for o in range(first, last + 1)] for r in range(block)]
    return first, tuple(tuple(t if 0 <= t < kernel else kernel for t in row) for row in taps)


class ShallowConv2d(nn.Conv2d):
    """nn.Conv2d whose input gradient is computed in blocks, on a CPU and where it is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        block = block_of(self, tuple(x.shape[2:])) if _pays(x) else None
        if block is None:
            return super().forward(x)
        made: Tensor = _Blocked.apply(x, self.weight, self.bias, self.stride[0], int(self.padding[0]), block)
        return made


def _pays(x: Tensor) -> bool:
    return own_gradient(x) and len(x) * x.shape[2] * x.shape[3] >= PIXELS


def own_gradient(x: Any) -> bool:
    """Where the gradient of a batch is wanted, and kernels for bfloat16 do not fill their lanes by themselves."""
    return float32_on_cpu(x) and x.requires_grad and torch.is_grad_enabled()


class _Blocked(torch.autograd.Function):
    """A convolution with the blocked input gradient. Its backward is made of differentiable operators, in float32
    also where it is called under autocast: the forward pass was."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, block: int) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *ctx.numbers = inputs
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        stride, padding, block = ctx.numbers
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        with torch.autocast("cpu", enabled=False):
            of_x = _input_gradient(gradient, weight, stride, padding, block) if for_x else None
        of_weight = of_bias = None
        if for_weight or for_bias:
            _, of_weight, of_bias = torch.ops.aten.convolution_backward(
                gradient, x, weight, [len(weight)] if ctx.biased else None,
                [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [False, for_weight, for_bias],
            )  # fmt: skip
        return of_x, of_weight, of_bias, None, None, None


def _input_gradient(gradient: Tensor, weight: Tensor, stride: int, padding: int, block: int) -> Tensor:
    first, taps = _reach(weight.shape[2], stride, padding, block)
    at = torch.tensor(taps)
    spread = F.pad(weight, (0, 1, 0, 1))[:, :, at[:, :, None, None], at]  # out, in, block, reach, block, reach
    kernel = spread.permute(1, 2, 4, 0, 3, 5).flatten(0, 2)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    return F.pixel_shuffle(F.conv2d(gradient, kernel, stride=block // stride, padding=-first), block)
