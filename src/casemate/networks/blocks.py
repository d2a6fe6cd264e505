"""Layers that several networks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def float32_on_cpu(x: Any) -> bool:
    """Whether `x` is a batch of maps in float32 on a CPU, outside autocast, and not a stand-in of a tracer (torch.fx,
    torch.compile, symbolic sizes), whose graph is to hold a layer as it is written."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    traced = not isinstance(x.shape[0], int) or torch.compiler.is_compiling()
    return not traced and not torch.is_autocast_enabled("cpu")


class GlobalMean(nn.Module):
    """Mean over the spatial axes: N x C x H x W -> N x C."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
