"""ResNet-101 (He et al. 2016) for images of about 224 pixels, as torchvision has it."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from casemate.errors import UserError
from casemate.fields import spec
from casemate.networks.base import Classifier, Normalise, Shape
from casemate.networks.blocks import GlobalMean
from casemate.networks.pretrained import Pretrained, out_of_place

SMALLEST = 32


@spec
class ResNet101(Pretrained):
    """7x7 stem and max pool, 3 + 4 + 23 + 3 bottlenecks with the stride in their 3x3 convolution.

    44,549,160 parameters for 1,000 classes. Three channels; any height and width from 32 on.
    """

    url: ClassVar = "https://download.pytorch.org/models/resnet101-63fe2227.pth"
    statistics: ClassVar = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        from torchvision.models import resnet101

        require_colour("resnet101", input_shape, SMALLEST)
        made = resnet101(num_classes=num_classes)
        normalise = self.begin(made, num_classes, normalise)
        out_of_place(made)
        layers: dict[str, nn.Module] = {
            "stem": nn.Sequential(made.conv1, made.bn1, made.relu, made.maxpool),
            **{f"stage{number}": getattr(made, f"layer{number}") for number in range(1, 5)},
            "pool": GlobalMean(),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=made.fc, normalise=normalise
        )


def require_colour(network: str, shape: Shape, smallest: int) -> None:
    """Raise UserError unless images have three channels and `smallest` pixels each way or more."""
    if shape[0] != 3 or min(shape[1:]) < smallest:
        raise UserError(
            f"network {network} takes 3 x H x W images from {smallest}x{smallest} on, not "
            f"{'x'.join(map(str, shape))}: choose another network"
        )
