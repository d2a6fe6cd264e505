"""Small networks for 8x8 digits and for MNIST-sized images."""

from __future__ import annotations

from torch import nn

from casemate.fields import Unit, spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_shape


@spec
class DigitsCNN(NetworkSpec):
    """Two 3x3 convolutions and a hidden layer for 1 x 8 x 8 images: 29,914 parameters with 10 classes."""

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("digits_cnn", input_shape, (1, 8, 8))
        layers = {
            "conv1": nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            "fc1": nn.Sequential(nn.Flatten(), nn.Linear(512, 48), nn.ReLU()),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(48, num_classes),
            normalise=normalise,
        )  # fmt: skip


@spec
class LeNet5(NetworkSpec):
    """LeNet-5 as in L2L-DA (Jang et al. 2019), for 1 x 28 x 28 images: 61,706 parameters with 10 classes.

    The ReLU follows the max pool: both orders give the same bits, and this one touches a quarter of the pixels.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("lenet5", input_shape, (1, 28, 28))
        layers = {
            "conv1": nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU()),
            "conv3": nn.Sequential(nn.Conv2d(16, 120, 5), nn.ReLU(), nn.Flatten()),
            "fc1": nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(84, num_classes),
            normalise=normalise,
        )  # fmt: skip


@spec
class SmallCNN(NetworkSpec):
    """The MNIST network of TRADES (Zhang et al. 2019), for 1 x 28 x 28 images: 312,202 parameters with 10 classes."""

    dropout: Unit = 0.5

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("small_cnn", input_shape, (1, 28, 28))
        layers = {
            "conv1": nn.Sequential(_conv(1, 32), nn.ReLU()),
            "conv2": nn.Sequential(_conv(32, 32), nn.MaxPool2d(2), nn.ReLU()),
            "conv3": nn.Sequential(_conv(32, 64), nn.ReLU()),
            "conv4": nn.Sequential(_conv(64, 64), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
            "fc1": nn.Sequential(nn.Linear(1024, 200), nn.ReLU(), nn.Dropout(self.dropout)),
            "fc2": nn.Sequential(nn.Linear(200, 200), nn.ReLU()),
        }
        head = nn.Linear(200, num_classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=head, normalise=normalise
        )


def _conv(width_in: int, width_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 3)
    nn.init.kaiming_normal_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
