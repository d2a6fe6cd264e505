"""Layers of torch's own made quick where that is known to pay: other kernels, the same function."""

from __future__ import annotations

from torch import nn

from casemate.networks.frozen_norm import FrozenNorm2d
from casemate.networks.shallow import ShallowConv2d, block_of
from casemate.networks.small_maps import SmallMapConv2d, wide

USUAL: dict[type[nn.Module], type[nn.Module]] = {
    ShallowConv2d: nn.Conv2d, SmallMapConv2d: nn.Conv2d, FrozenNorm2d: nn.BatchNorm2d,
}  # fmt: skip
"""The layer of torch that each quick one stands for."""


def quicken(network: nn.Module) -> None:
    """Swaps the class of layers in place: weights, names and outputs stay. What is more than a layer of torch is left
    alone. A new layer in place of the old would draw new weights."""
    for layer in network.modules():
        if type(layer) is nn.BatchNorm2d and layer.track_running_stats:
            layer.__class__ = FrozenNorm2d
        elif type(layer) is nn.Conv2d and block_of(layer, (64, 64)) is not None:
            layer.__class__ = ShallowConv2d
        elif type(layer) is nn.Conv2d and wide(layer):
            layer.__class__ = SmallMapConv2d


def usual(network: nn.Module) -> None:
    """Undoes `quicken`, for comparisons."""
    for layer in network.modules():
        layer.__class__ = USUAL.get(type(layer), type(layer))
