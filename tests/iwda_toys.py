"""Digits at 16 pixels, large enough for a patch of 11, and the classifier that halves them first."""

from __future__ import annotations

import torch.nn.functional as F
from attack_toys import digits, system, trained_network
from torch import Tensor, nn

from casemate.system import TorchSystem
from casemate.threat import ThreatModel

SHAPE = (1, 16, 16)
LINF = ThreatModel("linf", 0.1)


def network() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), trained_network())


def victim() -> TorchSystem:
    return system(network(), SHAPE, 10)


def pictures(n: int) -> tuple[Tensor, Tensor]:
    """Held-out digits that the network gets right."""
    x, y = (part[1500:] for part in digits())
    x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    right = network()(x).argmax(1) == y
    return x[right][:n], y[right][:n]
