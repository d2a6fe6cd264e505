"""Convolutions of many channels on small maps, in the memory layout that is fast on a CPU.

Networks run channels-last, which gains nearly everywhere; in float32, 3 x 3 convolutions of 512 channels on maps of
4 x 4 take 1.6 times as long there (2 x 2: 3.2 times, 6 x 6: 1.2 times), so these run contiguous inside. The same
numbers but for the order of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from casemate.networks.blocks import float32_on_cpu

CHANNELS = 320
"""At least so many channels, in and out: with 256 the difference is small, and unsteady."""
PIXELS = 36
"""At most so many pixels of a map: from 7 x 7 on there is no difference."""


def wide(layer: nn.Conv2d) -> bool:
    """Whether the layer is of the kind that is slow on small maps."""
    return (
        min(layer.in_channels, layer.out_channels) >= CHANNELS and layer.groups == 1 and layer.kernel_size != (1, 1)
    )


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d that takes a small channels-last map as a contiguous one, and returns it channels-last: in float32,
    for bfloat16 does not suffer."""

    def forward(self, x: Tensor) -> Tensor:
        if not float32_on_cpu(x) or x.shape[2] * x.shape[3] > PIXELS or x.is_contiguous():
            return super().forward(x)
        made: Tensor = self._conv_forward(x.contiguous(), self.weight.contiguous(), self.bias)
        return made.contiguous(memory_format=torch.channels_last)
