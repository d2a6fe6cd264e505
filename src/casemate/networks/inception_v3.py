"""Inception-v3 (Szegedy et al. 2016) for images of about 299 pixels, as torchvision has it."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.fields import Count, Unit, spec
from casemate.networks.base import Classifier, Normalise, Shape
from casemate.networks.blocks import GlobalMean
from casemate.networks.pretrained import Pretrained, out_of_place
from casemate.networks.resnet101 import require_colour

SMALLEST = 75
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


@spec
class InceptionV3(Pretrained):
    """Two convolutional stems and eleven mixed blocks, without the auxiliary classifier, which only training saw.

    23,834,568 parameters for 1,000 classes. Three channels; height and width from 75 on.
    """

    url: ClassVar = "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"
    statistics: ClassVar = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    side: Count | None = None
    """Images are scaled to this height and width first, bilinearly: 299 where the data set has 224 pixels."""
    dropout: Unit = 0.5
    """Before the head."""

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        from torchvision.models import inception_v3

        channels, height, width = input_shape
        require_colour("inception_v3", (channels, self.side or height, self.side or width), SMALLEST)
        made = inception_v3(
            num_classes=num_classes, aux_logits=False, init_weights=self.weights is None, dropout=self.dropout
        )
        normalise = self.begin(made, num_classes, normalise)
        out_of_place(made)
        first = [made.Conv2d_1a_3x3, made.Conv2d_2a_3x3, made.Conv2d_2b_3x3, made.maxpool1]
        layers: dict[str, nn.Module] = {
            "stem": nn.Sequential(*([] if self.side is None else [Scaled(self.side)]), *first),
            "stem2": nn.Sequential(made.Conv2d_3b_1x1, made.Conv2d_4a_3x3, made.maxpool2),
            **{f"mixed{name}": getattr(made, f"Mixed_{name}") for name in BLOCKS},
            "pool": nn.Sequential(GlobalMean(), made.dropout),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=made.fc, normalise=normalise
        )


class Scaled(nn.Module):
    """Images scaled to `side` x `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
