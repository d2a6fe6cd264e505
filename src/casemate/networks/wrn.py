"""Wide residual networks WRN-d-w (Zagoruyko and Komodakis 2016), without the dead stage of some public copies."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.fields import Count, spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean


@spec
class WideResNet(NetworkSpec):
    """WRN-depth-width: 36,479,194 parameters for 28-10, 46,160,474 for 34-10 (3 channels, 10 classes).

    `depth` is 6 n + 4. Any number of channels; height and width divisible by 4.
    """

    depth: Count = 28
    width: Count = 10

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("wrn", input_shape, 4)
        layers = wide_stages(input_shape[0], self.depth, self.width)
        width = 64 * self.width
        layers["norm"] = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        layers["pool"] = GlobalMean()
        head = nn.Linear(width, num_classes)
        nn.init.zeros_(head.bias)
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=head, normalise=normalise
        )


def wide_stages(channels: int, depth: int, width: int) -> dict[str, nn.Module]:
    """Stem and the three stages: `channels` in, 64 * `width` out. Raises UserError unless `depth` is 6 n + 4."""
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise UserError(f"the depth of a wide residual network is 6 n + 4 (10, 16, 22, 28, 34, ...), not {depth}")
    layers: dict[str, nn.Module] = {"stem": _conv(channels, 16, 3, 1)}
    wide = 16
    for number, stride in enumerate((1, 2, 2)):
        wider = 16 * width * 2**number
        chain = [WideBlock(wide, wider, stride)]
        chain += [WideBlock(wider, wider, 1) for _ in range(blocks - 1)]
        layers[f"stage{number + 1}"] = nn.Sequential(*chain)
        wide = wider
    return layers


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3 twice; a changed width is projected from the activated input, else the raw input is kept."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width_out)
        self.conv1 = _conv(width_in, width_out, 3, stride)
        self.conv2 = _conv(width_out, width_out, 3, 1)
        self.shortcut = None if width_in == width_out else _conv(width_in, width_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        out: Tensor = self.conv2(F.relu(self.norm2(h))) + kept
        return out


def _conv(width_in: int, width_out: int, size: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, bias=False)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (size * size * width_out)))
    return conv
