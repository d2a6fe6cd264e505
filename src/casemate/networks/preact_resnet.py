"""PreActResNet-18 for 32x32 images (He et al. 2016, "Identity Mappings")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean


@spec
class PreActResNet18(NetworkSpec):
    """Four stages of two pre-activation blocks, widths 64 to 512: 11,172,170 parameters for 3 channels, 10 classes.

    Any number of channels; height and width divisible by 8.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("preact_resnet18", input_shape, 8)
        layers: dict[str, nn.Module] = {"stem": nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)}
        width = 64
        for number, stride in enumerate((1, 2, 2, 2)):
            wider = 64 * 2**number
            layers[f"stage{number + 1}"] = nn.Sequential(_Block(width, wider, stride), _Block(wider, wider, 1))
            width = wider
        layers["norm"] = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        layers["pool"] = GlobalMean()
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(width, num_classes),
            normalise=normalise,
        )  # fmt: skip


class _Block(nn.Module):
    """BN-ReLU-conv twice; the projection shortcut reads the activated input, the identity the raw one."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        same = stride == 1 and width_in == width_out
        self.shortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        kept: Tensor = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        out: Tensor = self.conv2(F.relu(self.norm2(h))) + kept
        return out
