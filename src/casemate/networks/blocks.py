"""Layers that several networks share."""

from __future__ import annotations

from torch import Tensor, nn


class GlobalMean(nn.Module):
    """Mean over the spatial axes: N x C x H x W -> N x C."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
