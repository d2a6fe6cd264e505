"""ResNet-18 (He et al. 2016) with a 3x3 stem and no max pool: L2L-DA's network for 64x64 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean


@spec
class ResNet18(NetworkSpec):
    """Four stages of two basic blocks, widths 64 to 512: 11,271,432 parameters for 3 channels and 200 classes.

    Any number of channels; height and width divisible by 8.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("resnet18", input_shape, 8)
        layers: dict[str, nn.Module] = {
            "stem": nn.Sequential(_conv(input_shape[0], 64, 3, 1), nn.BatchNorm2d(64), nn.ReLU())
        }
        width = 64
        for number, stride in enumerate((1, 2, 2, 2)):
            wider = 64 * 2**number
            layers[f"stage{number + 1}"] = nn.Sequential(_Block(width, wider, stride), _Block(wider, wider, 1))
            width = wider
        layers["pool"] = GlobalMean()
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(width, num_classes),
            normalise=normalise,
        )  # fmt: skip


class _Block(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN beside the input (a 1x1 convolution with BN where the shape changes), then ReLU."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width_in, width_out, 3, stride), nn.BatchNorm2d(width_out)
        self.conv2, self.norm2 = _conv(width_out, width_out, 3, 1), nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(_conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def _conv(width_in: int, width_out: int, size: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
