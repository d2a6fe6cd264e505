"""Which patches of an image are compared: size, stride, scale and sampling, which a figure is meaningless without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.errors import UserError
from casemate.fields import Count, Seed, spec
from casemate.seeding import generator


@spec
class Windows:
    """The windows of `size` x `size` pixels at every `stride`-th place of an image, or `count` of them.

    No paper fixes them, and the ranking of attacks depends on all of them: publish a figure with its windows.
    """

    size: Count = 7
    stride: Count = 1
    scale: Count | None = None
    """Shorter side in pixels to which images are reduced first (bilinear, antialiased); their own size if None."""
    count: Count | None = None
    """So many windows drawn without replacement; all of them if None, or if there are no more."""
    sampling: Literal["shared", "independent"] = "shared"
    """Whether the two images are looked at in the same places. Independent draws from one and the same image are
    already a distance apart, the floor, below which nothing can be seen."""
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.sampling == "independent" and self.count is None:
            raise UserError("windows: sampling independent draws windows, so it needs a count")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of windows in an image of that size. Raises UserError if there is none."""
        if min(height, width) < self.size:
            raise UserError(f"windows of {self.size}x{self.size} do not fit into images of {height}x{width} pixels")
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1

    def sampled(self, height: int, width: int) -> bool:
        """Whether `count` leaves any window of such an image out."""
        rows, columns = self.grid(height, width)
        return self.count is not None and self.count < rows * columns

    def places(self, height: int, width: int, draw: int = 0) -> Tensor:
        """(n,) long: the windows looked at, counted row by row. `draw` tells independent draws apart."""
        rows, columns = self.grid(height, width)
        if not self.sampled(height, width):
            return torch.arange(rows * columns)
        rng = generator("windows", self.seed, draw, rows, columns)
        return torch.randperm(rows * columns, generator=rng)[: self.count].sort().values

    def prepare(self, x: Tensor) -> Tensor:
        """Images N x C x H x W in [0, 1] at the scale asked for; differentiable. Raises UserError if it is larger."""
        height, width = x.shape[-2:]
        if self.scale is None or self.scale == min(height, width):
            return x
        if self.scale > min(height, width):
            raise UserError(f"images of {height}x{width} pixels cannot be reduced to a shorter side of {self.scale}")
        ratio = self.scale / min(height, width)
        size = (max(self.scale, round(height * ratio)), max(self.scale, round(width * ratio)))
        return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)

    def patches(self, x: Tensor, draw: int = 0) -> Tensor:
        """N x n x d patches, d = C * size * size, of prepared images N x C x H x W; differentiable."""
        height, width = x.shape[-2:]
        columns = self.grid(height, width)[1]
        at = self.places(height, width, draw).to(x.device)
        every = x.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        found = every[:, :, at // columns, at % columns]  # N x C x n x size x size
        return found.transpose(1, 2).flatten(2)

    def __str__(self) -> str:
        where = f" at {self.scale} px" if self.scale else ""
        number = f"{self.count} {'at the same places' if self.sampling == 'shared' else 'drawn independently'}"
        return f"{self.size}x{self.size}, stride {self.stride}{where}, {number if self.count else 'all windows'}"


PROTOCOLS: Mapping[str, tuple[Windows, ...]] = {
    "digits": (Windows(size=3),),
    "mnist": (Windows(size=5),),
    "cifar": (Windows(size=7), Windows(size=11)),
    "imagenet": (
        *(Windows(size=11, scale=side) for side in (25, 32, 41, 53)),
        Windows(size=11, count=1024),
    ),
}
"""What to report for images of a kind, the primary figure first. At the finest scale noise looks far, at a coarse
one flips and rearrangements do: where there are several, report them all."""
