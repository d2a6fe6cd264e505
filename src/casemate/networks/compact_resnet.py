"""A small residual network whose work is in few wide layers on small maps, where a CPU computes fastest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean


@spec
class CompactResNet(NetworkSpec):
    """A 4x4 stem of stride 2, then basic blocks (He et al. 2016) 64-64, 64-128, 128-256 with strides 2, 1, 2.

    1,233,162 parameters for 3 channels and 10 classes. Any number of channels; height and width divisible by 8.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("compact_resnet", input_shape, 8)
        stem = nn.Conv2d(input_shape[0], 64, 4, 2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight)
        layers = {
            "stem": nn.Sequential(stem, nn.BatchNorm2d(64), nn.ReLU()),
            "stage1": _Block(64, 64, 2),
            "stage2": _Block(64, 128, 1),
            "stage3": _Block(128, 256, 2),
            "pool": GlobalMean(),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(256, num_classes),
            normalise=normalise,
        )  # fmt: skip


class _Block(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN beside a 1x1 shortcut with BN, then ReLU."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width_in, width_out, 3, stride), nn.BatchNorm2d(width_out)
        self.conv2, self.norm2 = _conv(width_out, width_out, 3, 1), nn.BatchNorm2d(width_out)
        self.shortcut = nn.Sequential(_conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def _conv(width_in: int, width_out: int, size: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv
