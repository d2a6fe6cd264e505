"""The networks of ER-Classifier (Li et al.): an encoder to a few numbers, a small classifier of them, and a critic.

`features(x)` is the code z (N x k), and `head` the classifier C that reads it. The layers are those of the authors'
code (liyao880/ER-Classifier), which brings its own input range: with no normalisation asked for, `er_conv` scales
images to [-1, 1] and `er_vgg` takes ImageNet's mean and deviation from colour images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.fields import Count, Flag, Unit, spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean
from casemate.networks.pretrained import Weighted

CriticOutput = Literal["logsigmoid", "linear"]

SYMMETRIC = (0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VGG = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions in each of the five stages, by depth."""
WIDTHS = (1, 2, 4, 8, 8)
"""Of the stages, over that of the first."""
PUBLISHED = {
    (16, False): "vgg16-397923af", (16, True): "vgg16_bn-6c64b313",
    (19, False): "vgg19-dcbb9e9d", (19, True): "vgg19_bn-c79401a0",
}  # fmt: skip
"""torchvision's files, by depth and whether there are batch norms."""


@spec
class ERConv(NetworkSpec):
    """Strided 4x4 convolutions as in a DCGAN critic, widths doubling from `dim`: the encoders of MNIST and STL10.

    The defaults are MNIST's: 11,019,780 parameters of the encoder and 134,838 of the head for 1 x 28 x 28 images and
    10 classes. STL10 (3 x 96 x 96) has `code: 16` and `closing: whole`: 82,363,920 and 140,838. Any square images of
    4 pixels or more; a `dim` of 16 or so trains on a CPU.
    """

    dim: Count = 128
    code: Count = 4
    hidden: tuple[Count, Count] = (500, 256)
    closing: Literal["strided", "whole"] = "strided"
    """How the last pixels go: by strided convolutions too, or, from 3 on, by one unpadded one of the same width."""

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        channels, side = input_shape[0], input_shape[1]
        if side != input_shape[2] or side < 4:
            raise UserError(f"network er_conv takes square images of 4 pixels or more, not {side}x{input_shape[2]}")
        layers: dict[str, nn.Module] = {}
        width, wider = channels, self.dim
        while side > (1 if self.closing == "strided" else 3):
            layers[f"conv{len(layers) + 1}"] = _strided(width, wider, 4, padding=1, normed=bool(layers))
            width, wider, side = wider, 2 * wider, side // 2
        if side > 1:
            layers[f"conv{len(layers) + 1}"] = _strided(width, width, side, padding=0, normed=True)
        layers["pool"] = GlobalMean()  # over a single pixel
        layers["code"] = nn.Linear(width, self.code)
        sizes, head = (self.code, *self.hidden), []
        for size_in, size_out in pairwise(sizes):
            head += [nn.Linear(size_in, size_out), nn.BatchNorm1d(size_out), nn.ReLU()]
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers,
            head=nn.Sequential(*head, nn.Linear(sizes[-1], num_classes)),
            normalise=normalise or Normalise(*([value] * channels for value in SYMMETRIC)),
        )  # fmt: skip


def _strided(width_in: int, width_out: int, size: int, *, padding: int, normed: bool) -> nn.Module:
    conv = nn.Conv2d(width_in, width_out, size, 2, padding, bias=False)
    return nn.Sequential(conv, *([nn.BatchNorm2d(width_out)] if normed else []), nn.ReLU())


@spec
class ERVGG(Weighted):
    """The convolutions of VGG16 or VGG19, and a code of 16 numbers: the CIFAR-10 encoder.

    With `batch_norm` (the default: a network that learns from scratch) 20,032,592 + 11,008 parameters for depth 19,
    and 14,731,344 for depth 16, which is that of the authors' later code; without it 20,032,592, which is what they
    published with, from weights of an undisclosed origin: `weights` begins with ImageNet's. The head has 539,146 for
    10 classes. Height and width are multiples of 16; a `width` of 8 or so trains on a CPU.
    """

    depth: Literal[16, 19] = 19
    batch_norm: Flag = True
    width: Count = 64
    code: Count = 16
    hidden: Count = 512
    dropout: Unit = 0.5

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("er_vgg", input_shape, 16)
        layers: dict[str, nn.Module] = {}
        wide = input_shape[0]
        for number, (times, convolutions) in enumerate(zip(WIDTHS, VGG[self.depth], strict=True), 1):
            stage: list[nn.Module] = [nn.MaxPool2d(2)] if number > 1 else []
            for _ in range(convolutions):
                stage += self._convolution(wide, times * self.width)
                wide = times * self.width
            layers[f"stage{number}"] = nn.Sequential(*stage)
        last = [nn.MaxPool2d(2)] if min(input_shape[1:]) >= 32 else []
        if self.weights is None:
            self._require_weights("sha256")
        else:
            self._begin([part for stage in layers.values() for part in stage.modules()])
        layers["pool"] = nn.Sequential(*last, GlobalMean())
        layers["code"] = nn.Linear(wide, self.code)
        if self.weights is not None or (normalise is None and input_shape[0] == 3):
            normalise = Normalise(*IMAGENET)
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=self._head(num_classes),
            normalise=normalise,
        )  # fmt: skip

    def published(self) -> str:
        return f"https://download.pytorch.org/models/{PUBLISHED[self.depth, self.batch_norm]}.pth"

    def _begin(self, parts: Sequence[nn.Module]) -> None:
        """Fill the convolutions and norms among `parts`, in order, with those of torchvision's VGG."""
        tensors, own = self._read(), [part for part in parts if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
        inside = {key.split(".")[1] for key in tensors if key.startswith("features.")}
        numbers = sorted(int(number) for number in inside if number.isdecimal())
        if len(numbers) != len(own):
            raise self._foreign(next(iter(tensors)))
        for number, part in zip(numbers, own, strict=True):
            here = {name: tensors.get(f"features.{number}.{name}", torch.empty(0)) for name in part.state_dict()}
            odd = [name for name, value in part.state_dict().items() if here[name].shape != value.shape]
            if odd:
                raise self._foreign(f"features.{number}.{odd[0]}")
            part.load_state_dict(here)

    def _convolution(self, width_in: int, width_out: int) -> list[nn.Module]:
        conv = nn.Conv2d(width_in, width_out, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        return [conv, *([nn.BatchNorm2d(width_out)] if self.batch_norm else []), nn.ReLU()]

    def _head(self, num_classes: int) -> nn.Module:
        wide = self.hidden  # there is no activation before the first dropout, as in the authors' code
        return nn.Sequential(
            nn.Linear(self.code, wide), nn.Dropout(self.dropout), nn.Linear(wide, wide), nn.ReLU(),
            nn.Dropout(self.dropout), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, num_classes),
        )  # fmt: skip


class CodeCritic(nn.Module):
    """ER's D on codes: N x k -> (N,), four hidden layers of `width` and a log-sigmoid, or nothing, at the end.

    791,041 parameters for k = 4, and 797,185 for k = 16, at width 512.
    """

    def __init__(self, code: int, *, width: int = 512, output: CriticOutput = "logsigmoid") -> None:
        super().__init__()
        self.output = output
        layers: list[nn.Module] = []
        for size in (code, width, width, width):
            layers += [nn.Linear(size, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, codes: Tensor) -> Tensor:
        out: Tensor = self.layers(codes)[:, 0]
        return F.logsigmoid(out) if self.output == "logsigmoid" else out


def encoder_parameters(classifier: Classifier) -> list[nn.Parameter]:
    """The parameters of Q: all of a classifier's but its head's."""
    return [p for part in (classifier.normalise, classifier.body) for p in part.parameters()]
