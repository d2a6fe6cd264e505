"""SinGAN's pairs over a pyramid of scales, made conditional: g(x, z) writes images near x, critics compare patches.

A window of 11 pixels is a large part of the coarsest image and a small one of the finest: together the critics see
patches from large to small (Shaham et al. 2019). Values are SinGAN's, about [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.networks.singan import PATCH, PatchCritic, PatchGenerator, width_at

RATIO = 0.75
"""About how much smaller each scale is than the next."""
LARGEST_PYRAMID = 11
"""Scales of a picture of 250 pixels: a bound where the size is unknown."""

Size = tuple[int, int]


def pyramid_sizes(
    height: int, width: int, scales: int | None = None, *, coarsest: int = 25, largest: int = 250, patch: int = PATCH
) -> list[Size]:
    """(H, W) of every scale, coarsest first, in a constant ratio near 0.75, rounded up, as SinGAN's code has them.

    From `coarsest` pixels on the shorter side to the whole picture, or to `largest` pixels on the longer; `scales` in
    all, or SinGAN's number: 10 at 224 (25, 32, 41, 52, 67, 85, 108, 138, 176, 224). A picture no larger than the
    coarsest scale has one. Raises UserError where the coarsest cannot hold a patch of side `patch`.
    """
    before, shrunk = min(height, width), min(1.0, largest / max(height, width))
    height, width = _up(height * shrunk), _up(width * shrunk)
    short = min(height, width)
    if min(short, coarsest) < patch:
        side = min(short, coarsest)
        raise UserError(f"patches are {patch}x{patch}, and the coarsest scale has {side} pixels on its shorter side")
    if short <= coarsest or scales == 1:
        return [(height, width)]
    if scales is None:
        scales = 2 + _steps(coarsest / before) - _steps(shrunk)
    ratio = (coarsest / short) ** (1 / (scales - 1))
    steps = [ratio ** (scales - 1 - scale) for scale in range(scales)]
    return [(_up(height * step), _up(width * step)) for step in steps]


def _steps(share: float) -> int:
    """How many times RATIO fits between 1 and `share`, rounded up."""
    return math.ceil(math.log(share) / math.log(RATIO) - 1e-9)


def _up(side: float) -> int:
    return math.ceil(round(side, 6))


def size_of(images: Tensor) -> Size:
    """(H, W)."""
    return images.shape[-2], images.shape[-1]


def resized(x: Tensor, size: Size) -> Tensor:
    """Bilinear, smoothed where it shrinks; `x` itself at its own size."""
    if size_of(x) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=size[0] < x.shape[2])


class PyramidGenerator(nn.Module):
    """One `PatchGenerator` for each of `sizes`: at every scale a residual on what the coarser scales made.

    29,763 parameters for each of the four coarsest scales, for 3 channels and width 32, which doubles every four.
    """

    def __init__(self, channels: int, sizes: Sequence[Size], *, width: int = 32) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        widths = [width_at(scale, narrowest=width, widest=4 * width) for scale in range(len(sizes))]
        self.scales = nn.ModuleList(PatchGenerator(channels, width=wide) for wide in widths)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The images at every scale, coarsest first."""
        return [resized(x, size) for size in self.sizes]

    def forward(self, real: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
        """What every scale makes of the images at its size with noise of the same shape added.

        The coarsest one begins at the image itself, which so is what g is near to.
        """
        made: list[Tensor] = []
        for scale, image, z in zip(self.scales, real, noise, strict=True):
            previous = resized(made[-1], size_of(image)) if made else image
            made.append(scale(image + z, previous))
        return made


class PyramidCritic(nn.Module):
    """One `PatchCritic` for each scale. `norm` "none" leaves its batch norms out: with them, one image's score
    depends on the other images."""

    def __init__(
        self, channels: int, scales: int, *, width: int = 32, norm: Literal["batch", "none"] = "batch"
    ) -> None:
        super().__init__()
        widths = [width_at(scale, narrowest=width, widest=4 * width) for scale in range(scales)]
        self.scales = nn.ModuleList(PatchCritic(channels, width=wide, norm=norm == "batch") for wide in widths)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The score map (N x 1 x (H - 10) x (W - 10)) of every scale."""
        return [critic(image) for critic, image in zip(self.scales, images, strict=True)]
