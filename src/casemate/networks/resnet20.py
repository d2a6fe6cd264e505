"""ResNet-20 for 32x32 images with parameter-free (option A) shortcuts (He et al. 2016, section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean


@spec
class ResNet20(NetworkSpec):
    """Three stages of three basic blocks, widths 16/32/64: 269,722 parameters for 3 channels and 10 classes.

    Any number of channels; height and width divisible by 4.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("resnet20", input_shape, 4)
        layers = {
            "stem": nn.Sequential(_conv(input_shape[0], 16, 1), nn.BatchNorm2d(16), nn.ReLU()),
            "stage1": _stage(16, 16, 1),
            "stage2": _stage(16, 32, 2),
            "stage3": _stage(32, 64, 2),
            "pool": GlobalMean(),
        }
        head = nn.Linear(64, num_classes)
        nn.init.kaiming_normal_(head.weight)
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=head, normalise=normalise
        )


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width_in, width_out, stride), nn.BatchNorm2d(width_out)
        self.conv2, self.norm2 = _conv(width_out, width_out, 1), nn.BatchNorm2d(width_out)
        self.stride, self.padding = stride, (width_out - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return F.relu(h + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """The identity, or every second pixel with zero channels added on both sides."""
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


def _stage(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(width_in, width_out, stride), _Block(width_out, width_out, 1), _Block(width_out, width_out, 1)
    )


def _conv(width_in: int, width_out: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return conv
