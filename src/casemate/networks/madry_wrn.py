"""The wide residual network of MadryLab's cifar10_challenge and of free adversarial training, "w32-10"."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.fields import Count, spec
from casemate.networks.base import Classifier, NetworkSpec, Normalise, Shape, require_divisible
from casemate.networks.blocks import GlobalMean

SLOPE = 0.1


@spec
class MadryWRN(NetworkSpec):
    """Three stages of `units` residual units, widths 16/32/64 times `width`, strides 1/2/2; 5 and 10 are "w32-10".

    Beside `wrn`: each image is standardised, activations are leaky (slope 0.1), shortcuts have no parameters (average
    pool, zero channels), and the first unit of the first stage activates its shortcut, too. 45,901,914 parameters
    for 3 channels and 10 classes; 36,220,634 with 4 units, the depth that bilateral adversarial training (Wang and
    Zhang 2019) names and does not have in its code. Any number of channels; height and width divisible by 4.
    """

    units: Count = 5
    width: Count = 10

    def build(self, input_shape: Shape, num_classes: int, normalise: Normalise | None = None) -> Classifier:
        require_divisible("madry_wrn", input_shape, 4)
        layers: dict[str, nn.Module] = {"stem": nn.Sequential(Standardise(), _conv(input_shape[0], 16, 1))}
        wide = 16
        for number, stride in enumerate((1, 2, 2)):
            wider = 16 * self.width * 2**number
            chain = [_Unit(wide, wider, stride, activate_shortcut=number == 0)]
            chain += [_Unit(wider, wider, 1) for _ in range(self.units - 1)]
            layers[f"stage{number + 1}"] = nn.Sequential(*chain)
            wide = wider
        layers["norm"] = nn.Sequential(_norm(wide), nn.LeakyReLU(SLOPE))
        layers["pool"] = GlobalMean()
        head = nn.Linear(wide, num_classes)
        nn.init.zeros_(head.bias)
        return Classifier(
            input_shape=input_shape, num_classes=num_classes, layers=layers, head=head, normalise=normalise
        )


class Standardise(nn.Module):
    """(x - mean) / max(std, 1 / (255 sqrt(n))) of each image, over its n values: TensorFlow's, for [0, 1] images."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1] * x.shape[2] * x.shape[3]
        centred = x - x.mean((1, 2, 3), keepdim=True)
        # the floor is put under the variance: a flat image then has a gradient, and none that is not a number
        variance = centred.square().mean((1, 2, 3), keepdim=True).clamp_min(1 / (255**2 * n))
        return centred * variance.rsqrt()


class _Unit(nn.Module):
    """BN-LeakyReLU-conv3x3 twice, beside the raw input (or, with `activate_shortcut`, the activated one)."""

    def __init__(self, width_in: int, width_out: int, stride: int, *, activate_shortcut: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width_in), _norm(width_out)
        self.conv1, self.conv2 = _conv(width_in, width_out, stride), _conv(width_out, width_out, 1)
        self.stride, self.padding, self.activate_shortcut = stride, (width_out - width_in) // 2, activate_shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm1(x), SLOPE)
        kept = h if self.activate_shortcut else x
        if self.stride != 1:
            kept = F.avg_pool2d(kept, self.stride)
        if self.padding:
            kept = F.pad(kept, (0, 0, 0, 0, self.padding, self.padding))
        out: Tensor = self.conv2(F.leaky_relu(self.norm2(self.conv1(h)), SLOPE))
        return out + kept


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.1)


def _conv(width_in: int, width_out: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
    nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (9 * width_out)))
    return conv
