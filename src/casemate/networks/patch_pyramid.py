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
MANY = 128
"""From this side on the number of scales is SinGAN's rule; smaller images have FEW."""
FEW = 3


def pyramid_sizes(
    height: int, width: int, scales: int | None = None, *, coarsest: int = 25, largest: int = 250
) -> list[tuple[int, int]]:
    """(H, W) of every scale, coarsest first, in a constant ratio near 0.75.

    The shorter side begins at `coarsest` and the longer one ends at `largest` at most; an image no larger than the
    coarsest scale has one. Without `scales` there are three below 128 pixels, and SinGAN's number from there on: 10
    at 224 (25, 32, 41, 52, 67, 85, 108, 138, 176, 224). Raises UserError where a scale is smaller than a patch.
    """
    shrunk = min(1.0, largest / max(height, width))
    height, width = math.ceil(round(height * shrunk, 6)), math.ceil(round(width * shrunk, 6))
    short = min(height, width)
    if min(short, coarsest) < PATCH:
        raise UserError(f"patches are {PATCH}x{PATCH}, and the coarsest scale has {min(short, coarsest)} pixels")
    if short <= coarsest or scales == 1:
        return [(height, width)]
    if scales is None:
        scales = FEW if short < MANY else math.ceil(math.log(coarsest / short) / math.log(RATIO) - 1e-9) + 2
    ratio = (coarsest / short) ** (1 / (scales - 1))
    steps = [ratio ** (scales - 1 - scale) for scale in range(scales)]
    return [(math.ceil(round(height * step, 6)), math.ceil(round(width * step, 6))) for step in steps]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, smoothed where it shrinks."""
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=size[0] < x.shape[2])


class PyramidGenerator(nn.Module):
    """One `PatchGenerator` for each of `sizes`: at every scale a residual on what the coarser scales made.

    29,763 parameters for each of the four coarsest scales, for 3 channels and width 32, which doubles every four.
    """

    def __init__(self, channels: int, sizes: Sequence[tuple[int, int]], *, width: int = 32) -> None:
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
            previous = resized(made[-1], (image.shape[2], image.shape[3])) if made else image
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
        self.scales = nn.ModuleList(PatchCritic(channels, width=wide) for wide in widths)
        if norm == "none":
            for critic in self.scales:
                body: nn.Sequential = critic.body  # type: ignore[assignment]
                critic.body = nn.Sequential(*(layer for layer in body if not isinstance(layer, nn.BatchNorm2d)))

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The score map (N x 1 x (H - 10) x (W - 10)) of every scale."""
        return [critic(image) for critic, image in zip(self.scales, images, strict=True)]
