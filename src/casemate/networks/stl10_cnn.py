"""The STL-10 network of random self-ensembles (Liu et al. 2018): six convolutions for 96x96 images."""

from __future__ import annotations

from torch import nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_shape


@spec
class STL10CNN(NetworkSpec):
    """3x3 convolutions with batch norm: 32, 64, 128, 256, each with a max pool, then 256 and 512 without padding.

    2,166,282 parameters with 10 classes. For 3 x 96 x 96 images.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("stl10_cnn", input_shape, (3, 96, 96))
        layers: dict[str, nn.Module] = {}
        width = 3
        for number, wider in enumerate((32, 64, 128, 256), 1):
            layers[f"conv{number}"] = nn.Sequential(*_conv(width, wider, 1), nn.MaxPool2d(2))
            width = wider
        layers["conv5"] = nn.Sequential(*_conv(256, 256, 0))
        layers["conv6"] = nn.Sequential(*_conv(256, 512, 0))
        layers["pool"] = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(512, num_classes),
            normalise=normalise,
        )  # fmt: skip


def _conv(width_in: int, width_out: int, padding: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width_in, width_out, 3, padding=padding), nn.BatchNorm2d(width_out), nn.ReLU()
