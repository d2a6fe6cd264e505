"""The MNIST networks of several code bases.

MadryLab's challenge, fast adversarial training (Wong et al. 2020), triplet loss adversarial training (TLA, Mao et al.
2019), and what the authors of ER-Classifier (Li et al.) compare with.
"""

from __future__ import annotations

from torch import nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_shape


@spec
class MadryCNN(NetworkSpec):
    """MadryLab's mnist_challenge network, for 1 x 28 x 28 images: 3,274,634 parameters with 10 classes.

    Initialised as there: normal weights cut at two standard deviations of 0.1, biases of 0.1.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("madry_cnn", input_shape, (1, 28, 28))
        layers = {
            "conv1": nn.Sequential(nn.Conv2d(1, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
            "fc1": nn.Sequential(nn.Linear(64 * 7 * 7, 1024), nn.ReLU()),
        }
        made = Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(1024, num_classes),
            normalise=normalise,
        )  # fmt: skip
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, 0.1)
            else:
                nn.init.trunc_normal_(parameter, std=0.1, a=-0.2, b=0.2)
        return made


@spec
class FastCNN(NetworkSpec):
    """The MNIST network of fast adversarial training, for 1 x 28 x 28 images: 166,406 parameters with 10 classes."""

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("fast_cnn", input_shape, (1, 28, 28))
        layers = {
            "conv1": nn.Sequential(nn.Conv2d(1, 16, 4, 2, padding=1), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(16, 32, 4, 2, padding=1), nn.ReLU(), nn.Flatten()),
            "fc1": nn.Sequential(nn.Linear(32 * 7 * 7, 100), nn.ReLU()),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(100, num_classes),
            normalise=normalise,
        )  # fmt: skip


@spec
class TLACNN(NetworkSpec):
    """The MNIST network of TLA, for 1 x 28 x 28 images.

    13,247,178 parameters with 10 classes: 13,244,170 weights and biases, and 3,008 of the batch norms behind each
    layer but the last.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("tla_cnn", input_shape, (1, 28, 28))
        layers: dict[str, nn.Module] = {}
        width = 1
        for number, wider in enumerate((32, 64, 128, 256), 1):
            chain = [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            chain += [nn.MaxPool2d(2)] if number % 2 == 0 else []
            layers[f"conv{number}"] = nn.Sequential(*chain, *([nn.Flatten()] if number == 4 else []))
            width = wider
        layers["fc1"] = nn.Sequential(nn.Linear(256 * 7 * 7, 1024), nn.BatchNorm1d(1024), nn.ReLU())
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(1024, num_classes),
            normalise=normalise,
        )  # fmt: skip


@spec
class ERPlainCNN(NetworkSpec):
    """The MNIST network that ER-Classifier's authors leave undefended, for 1 x 28 x 28 images.

    431,080 parameters with 10 classes. Their random self-ensemble has the same layers, and noise behind each
    convolution. The ReLU follows the max pool, as in `lenet5`.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("er_plain_cnn", input_shape, (1, 28, 28))
        layers = {
            "conv1": nn.Sequential(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
            "fc1": nn.Sequential(nn.Linear(50 * 4 * 4, 500), nn.ReLU()),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(500, num_classes),
            normalise=normalise,
        )  # fmt: skip
