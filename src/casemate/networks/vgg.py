"""VGG-16 with batch norm and one linear layer, as random self-ensembles use it on CIFAR-10 (Liu et al. 2018)."""

from __future__ import annotations

from torch import nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and number of convolutions before each max pool."""


@spec
class VGG16BN(NetworkSpec):
    """Configuration D of Simonyan and Zisserman 2015, batch norm after each of the thirteen convolutions.

    14,728,266 parameters for 3 channels and 10 classes. Any number of channels; height and width divisible by 32.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("vgg16_bn", input_shape, 32)
        layers: dict[str, nn.Module] = {}
        width = input_shape[0]
        for number, (wider, depth) in enumerate(STAGES, 1):
            chain: list[nn.Module] = []
            for _ in range(depth):
                chain += [_conv(width, wider), nn.BatchNorm2d(wider), nn.ReLU()]
                width = wider
            layers[f"stage{number}"] = nn.Sequential(*chain, nn.MaxPool2d(2))
        layers["pool"] = GlobalMean()
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(width, num_classes),
            normalise=normalise,
        )  # fmt: skip


def _conv(width_in: int, width_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
