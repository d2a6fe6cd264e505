"""The classifiers of Defense-GAN (Samangouei et al. 2018), A to F, and of the manifold attack that breaks it.

Layers of the authors' code (kabkabm/defensegan), and of the notebook of Athalye et al. 2018.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from casemate.fields import spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_shape

CONVOLUTIONS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "A": ((64, 5, 1, 2), (64, 5, 2, 0)),
    "B": ((64, 8, 2, 3), (128, 6, 2, 0), (128, 5, 1, 0)),
    "C": ((128, 3, 1, 1), (64, 5, 2, 0)),
    "D": (),
}
"""Width, kernel, stride and padding of each."""
HIDDEN: dict[str, tuple[int, ...]] = {"A": (128,), "B": (), "C": (128,), "D": (200, 200)}
DROPOUT = {
    "A": {"conv2": 0.25, "fc1": 0.5}, "B": {"image": 0.2, "conv3": 0.5}, "C": {"conv2": 0.25, "fc1": 0.5},
    "D": {"fc1": 0.5},
}  # fmt: skip
"""The printed rates, by the layer that they are behind."""
WITHOUT_DROPOUT = {"E": "D", "F": "B"}


@spec
class DefenseGANNet(NetworkSpec):
    """One of Defense-GAN's six networks, for 1 x 28 x 28 images.

    Parameters with 10 classes: A 1,285,194, B and F 710,218, C 1,387,210, D and E 199,210. Initialised as there: the
    weights that one unit reads are normal and scaled to unit norm, biases are 0.
    """

    letter: Literal["A", "B", "C", "D", "E", "F"] = "A"
    """A and C: two convolutions and a hidden layer. B: three convolutions. D: two hidden layers. E and F: D and B
    without dropout."""
    dropout: Literal["dropped", "kept"] = "dropped"
    """What the printed rates are the shares of; the authors' code hands them on as shares that are kept."""

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("defense_gan_net", input_shape, (1, 28, 28))
        like = WITHOUT_DROPOUT.get(self.letter, self.letter)
        layers: dict[str, list[nn.Module]] = {}
        wide, side, _ = input_shape
        for number, (wider, size, stride, padding) in enumerate(CONVOLUTIONS[like], 1):
            layers[f"conv{number}"] = [nn.Conv2d(wide, wider, size, stride, padding), nn.ReLU()]
            wide, side = wider, (side + 2 * padding - size) // stride + 1
        wide *= side * side
        for number, wider in enumerate(HIDDEN[like], 1):
            layers[f"fc{number}"] = [nn.Flatten(), nn.Linear(wide, wider), nn.ReLU()]
            wide = wider
        if not HIDDEN[like]:
            layers[list(layers)[-1]].append(nn.Flatten())
        if self.letter not in WITHOUT_DROPOUT:
            self._add_dropout(layers, DROPOUT[like])
        made = Classifier(
            input_shape=input_shape, num_classes=num_classes, head=nn.Linear(wide, num_classes), normalise=normalise,
            layers={name: nn.Sequential(*parts) for name, parts in layers.items()},
        )  # fmt: skip
        _begin(made)
        return made

    def _add_dropout(self, layers: dict[str, list[nn.Module]], rates: dict[str, float]) -> None:
        for name, rate in rates.items():
            layer = nn.Dropout(rate if self.dropout == "dropped" else 1 - rate)
            if name == "image":
                next(iter(layers.values())).insert(0, layer)
            else:
                layers[name].append(layer)


@spec
class ManifoldCNN(NetworkSpec):
    """The network that the manifold attack on Defense-GAN was shown on, for 1 x 28 x 28 images.

    1,861,898 parameters with 10 classes.
    """

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_shape("manifold_cnn", input_shape, (1, 28, 28))
        layers = {
            "conv1": nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU()),
            "conv2": nn.Sequential(nn.Conv2d(64, 128, 3), nn.MaxPool2d(2), nn.ReLU()),
            "conv3": nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.25)),
            "fc1": nn.Sequential(nn.Linear(128 * 10 * 10, 128), nn.ReLU(), nn.Dropout(0.5)),
        }
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=nn.Linear(128, num_classes),
            normalise=normalise,
        )  # fmt: skip


def _begin(made: Classifier) -> None:
    """Unit norm for all that a unit reads."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_()
                parameter.div_(parameter.flatten(1).norm(dim=1).view(-1, *[1] * (parameter.dim() - 1)))
