"""The networks that LID was published with (Ma et al. 2018), for MNIST and for CIFAR-10."""

from __future__ import annotations

from torch import nn

from casemate.errors import UserError
from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape

DROPOUT = 0.5
PLANS: dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...], int]] = {
    (1, 28, 28): ((64, 64), (128,), 0),
    (3, 32, 32): ((32, 32, 64, 64, 128, 128), (1024, 512), 1),
}
"""Widths of the convolutions, widths of the hidden layers, and the padding, by the images' shape."""


@spec
class LIDCNN(NetworkSpec):
    """3x3 convolutions with a max pool after every second one, a batch norm behind each ReLU, and dropout.

    1,219,146 parameters for 1 x 28 x 28 images and 10 classes, 2,919,082 for 3 x 32 x 32. Layers of the authors' code
    (xingjunm/lid_adversarial_subspace_detection), which also scales images to [-0.5, 0.5] and decays the weights of
    CIFAR-10's hidden layers by 0.01: that is a profile's to say.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        if tuple(input_shape) not in PLANS:
            shown = "x".join(map(str, input_shape))
            raise UserError(f"network lid_cnn takes 1x28x28 or 3x32x32 images, not {shown}: choose another network")
        widths, hidden, padding = PLANS[tuple(input_shape)]
        layers: dict[str, nn.Module] = {}
        wide, side, _ = input_shape
        for number, wider in enumerate(widths, 1):
            chain = [nn.Conv2d(wide, wider, 3, padding=padding), nn.ReLU(), nn.BatchNorm2d(wider)]
            wide, side = wider, side + 2 * padding - 2
            if number % 2 == 0:
                chain, side = [*chain, nn.MaxPool2d(2)], side // 2
            if number == len(widths):
                chain, wide = [*chain, nn.Dropout(DROPOUT), nn.Flatten()], wide * side * side
            layers[f"conv{number}"] = nn.Sequential(*chain)
        for number, wider in enumerate(hidden, 1):
            layers[f"fc{number}"] = nn.Sequential(
                nn.Linear(wide, wider), nn.ReLU(), nn.BatchNorm1d(wider), nn.Dropout(DROPOUT)
            )
            wide = wider
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(wide, num_classes),
            normalise=normalise,
        )  # fmt: skip
