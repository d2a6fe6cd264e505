"""Moving an image's pixels about: flows and rotations, and the budgets of attacks that are measured by them.

A flow is N x 2 x H x W in pixels: first the way to the right, then the way down. Warping is backward: the new pixel
at p is the old image at p + flow(p), bilinear between pixels, and beyond the edge the edge itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.threat import TOLERANCE

AGREEMENT = 1e-4
"""Two ways to interpolate may differ by so much, in pixel units: their coordinates are rounded differently."""


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Images `x` (N x C x H x W) moved by `flow`; exactly `x` where the flow is zero. Differentiable in the flow.

    Values stay between those of the clean image, so the box [0, 1] needs no clipping. At a pixel's own place the
    slope is that to the right and downward, at the last one that from before it.
    """
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device, dtype=x.dtype).view(-1, 1)
    columns = torch.arange(width, device=x.device, dtype=x.dtype)
    u, v = _within(columns + flow[:, 0], width - 1), _within(rows + flow[:, 1], height - 1)
    left, top = u.detach().floor().clamp(max=max(width - 2, 0)), v.detach().floor().clamp(max=max(height - 2, 0))
    at = (top * width + left).long().flatten(1)[:, None].expand(-1, x.shape[1], -1)
    right, down, flat = min(width - 1, 1), width * min(height - 1, 1), x.flatten(2)

    def corner(offset: int) -> Tensor:
        return flat.gather(2, at + offset).view_as(x)

    across, along = (u - left)[:, None], (v - top)[:, None]
    upper = torch.lerp(corner(0), corner(right), across)
    return torch.lerp(upper, torch.lerp(corner(down), corner(down + right), across), along)


def _within(place: Tensor, last: int) -> Tensor:
    """Cut to [0, last], with a slope at both ends: a clamp has none, and pixels of the edge would never start."""
    return place.where(place >= 0, 0.0).where(place <= last, float(last))


def displacement(flow: Tensor) -> Tensor:
    """(N,) the longest way of any pixel, in pixels: the norm ||tau||_T of Alaifari et al. (2019)."""
    longest: Tensor = flow.norm(dim=1).flatten(1).amax(1)
    return longest


def limited(flow: Tensor, limit: float) -> Tensor:
    """`flow` with every vector longer than `limit` pixels cut to it."""
    length: Tensor = flow.norm(dim=1, keepdim=True)
    return flow * (limit / length.clamp_min(limit))


def rotate(x: Tensor, degrees: Tensor, shift: Tensor | None = None) -> Tensor:
    """Images turned counter-clockwise about their centre by `degrees` (N,), then moved by `shift` (N x 2, pixels to
    the right and down), bilinear; black comes in from outside. Differentiable in `x`."""
    height, width = x.shape[-2:]
    across, down = _sources(x, degrees, shift)
    grid = torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _sources(x: Tensor, degrees: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(columns, rows), each N x H x W: where each pixel of the turned image comes from."""
    n, _, height, width = x.shape
    angle = torch.deg2rad(degrees.to(x)).view(-1, 1, 1)
    moved = x.new_zeros(n, 2) if shift is None else shift.to(x)
    centre = (width - 1) / 2, (height - 1) / 2
    columns = torch.arange(width, device=x.device, dtype=x.dtype) - centre[0] - moved[:, 0].view(-1, 1, 1)
    rows = torch.arange(height, device=x.device, dtype=x.dtype).view(-1, 1) - centre[1] - moved[:, 1].view(-1, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    return cos * columns - sin * rows + centre[0], sin * columns + cos * rows + centre[1]


@dataclass(frozen=True)
class FlowBudget:
    """Warps of the clean image, with no pixel taken from further than `limit` pixels; None for no limit.

    What an attack minimises beside, such as the roughness of the flow, is no limit, and not checked: the name says
    it (`flow tau 0.05`).
    """

    name: str
    limit: float | None = None
    norm: ClassVar[str] = "flow"

    @property
    def radius(self) -> float | None:
        return self.limit

    def contains(self, x_adv: Tensor, x: Tensor, flow: Tensor | None = None) -> Tensor:
        """(N,) bool. Checked from the images alone: finite, in [0, 1], and each value between the smallest and the
        largest clean one of its channel within reach. With the `flow` also that none of its vectors is too long,
        and that the clean image, warped by it once more and by another implementation, is `x_adv`."""
        inside = in_box(x_adv) & self._within_reach(x_adv, x)
        if flow is None:
            return inside
        if self.limit is not None:
            inside &= displacement(flow) <= self.limit * (1 + TOLERANCE)
        return inside & same(_warp_by_grid(x, flow), x_adv)

    def _within_reach(self, x_adv: Tensor, x: Tensor) -> Tensor:
        reach = max(x.shape[-2:]) if self.limit is None else min(math.ceil(self.limit), max(x.shape[-2:]))
        high, low = _highest(x, reach), -_highest(-x, reach)
        return ((x_adv <= high + TOLERANCE) & (x_adv >= low - TOLERANCE)).flatten(1).all(1)

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name}, at most {self.limit:g} px"


@dataclass(frozen=True)
class RotationBudget:
    """The clean image turned by at most `degrees` and moved by at most `shift` pixels each way, black outside."""

    degrees: float
    shift: float
    norm: ClassVar[str] = "rotation"

    @property
    def radius(self) -> float:
        return self.degrees

    def contains(self, x_adv: Tensor, x: Tensor, moved: Tensor) -> Tensor:
        """(N,) bool. `moved` (N x 3) are the degrees and the way right and down: they must be within bounds, and the
        clean image so turned, by another implementation than the attack's, must be `x_adv`."""
        slack = 1 + TOLERANCE
        within = (moved[:, 0].abs() <= self.degrees * slack) & (moved[:, 1:].abs().amax(1) <= self.shift * slack)
        return in_box(x_adv) & within & same(_turn_by_flow(x, moved), x_adv)

    def __str__(self) -> str:
        return f"rotation {self.degrees:g} deg" + (f", shift {self.shift:g} px" if self.shift else "")


def in_box(x_adv: Tensor) -> Tensor:
    """(N,) bool: finite, and in [0, 1]."""
    flat = x_adv.flatten(1)  # extrema carry NaN along, and every comparison with NaN is false
    return (flat.amin(1) >= -TOLERANCE) & (flat.amax(1) <= 1 + TOLERANCE)


def same(made: Tensor, x_adv: Tensor) -> Tensor:
    """(N,) bool: equal but for the rounding of coordinates."""
    return (made - x_adv).abs().flatten(1).amax(1) <= AGREEMENT


def _highest(x: Tensor, reach: int) -> Tensor:
    """The largest value within `reach` pixels each way."""
    for size in ((1, 2 * reach + 1), (2 * reach + 1, 1)):
        x = F.max_pool2d(x, size, stride=1, padding=(size[0] // 2, size[1] // 2))
    return x


def _warp_by_grid(x: Tensor, flow: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    columns = torch.arange(width, device=x.device) + flow[:, 0].double()
    rows = torch.arange(height, device=x.device).view(-1, 1) + flow[:, 1].double()
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    return F.grid_sample(x.double(), grid, padding_mode="border", align_corners=False).to(x)


def _turn_by_flow(x: Tensor, moved: Tensor) -> Tensor:
    """A margin of black, then a flow to where each pixel comes from."""
    height, width = x.shape[-2:]
    columns, rows = _sources(x.double(), moved[:, 0], moved[:, 1:])
    flow = torch.stack([columns - torch.arange(width, device=x.device),
                        rows - torch.arange(height, device=x.device).view(-1, 1)], dim=1)  # fmt: skip
    padded = F.pad(x.double(), (1, 1, 1, 1))
    return warp(padded, F.pad(flow, (1, 1, 1, 1)))[..., 1:-1, 1:-1].to(x)
