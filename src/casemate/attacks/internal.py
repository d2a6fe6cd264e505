"""The internal Wasserstein distance (IWD) of two images, as far as attacks need it: distances, a budget, a choice.

The IWD compares the patches of one image with those of the other, wherever they lie: the least mean l1 distance of
matched patches ("Internal Wasserstein Distance for Adversarial Attack and Defense"). Here it is per number of a
patch, in pixel units, so that no image in an linf ball is further away than the ball's radius.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from casemate.attacks.base import Cost, Shown
from casemate.attacks.warping import in_box
from casemate.errors import UserError
from casemate.iwd import Windows
from casemate.iwd.bounds import marginal
from casemate.iwd.exact import assign
from casemate.iwd.sliced import directions, sliced
from casemate.objectives import margin
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import TOLERANCE, Goal

MOST = 1024
"""Patches of an image in an exact distance. Where there are more, a regular grid of them, the same in both images."""
DIRECTIONS = 64
"""Projections by which candidates are compared: the same ones for every attack and image."""
HALVINGS = 8


def grid_stride(shape: Sequence[int], window: int) -> int:
    """The least stride that leaves at most 1024 windows of images of a shape (..., H, W)."""
    rows, columns = (side - window + 1 for side in shape[-2:])
    stride = 1
    while math.ceil(rows / stride) * math.ceil(columns / stride) > MOST:
        stride += 1
    return stride


def apart(x_adv: Tensor, x: Tensor, window: int) -> Tensor:
    """(N,) sliced distance by which candidates are compared: fixed directions, patches on the grid."""
    windows = Windows(size=window, stride=grid_stride(x.shape, window))
    along = directions(DIRECTIONS, x.shape[1], windows, generator("internal distance", window))
    return sliced(x, x_adv, windows, along).value


@dataclass(frozen=True)
class IWDBudget:
    """Images whose IWD from the clean one is at most `radius` per number, in pixel units; None for any image.

    Of the patches of side `window`, all where there are no more than 1024, else a grid of them. A coupling of both
    images' patches that costs no more than the radius proves membership: the witness (N x patches, long) says for
    each clean patch how much further on in the list its partner is, so zeros pair patches of the same place.
    """

    radius: float | None
    window: int = 11
    norm: ClassVar[str] = "iwd"

    def coupling(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A witness for each image: zeros where these suffice, else the cheapest coupling (an optimal assignment)."""
        stride = grid_stride(x.shape, self.window)
        windows = Windows(size=self.window, stride=stride)
        offsets = torch.zeros(len(x), len(windows.places(*x.shape[-2:])), dtype=torch.long)
        for i in (~self._affords(x_adv, x, offsets)).nonzero()[:, 0].tolist():
            u, v = (windows.patches(part[i : i + 1].nan_to_num().double().cpu())[0].numpy() for part in (x, x_adv))
            columns = assign(cdist(u, v, "cityblock"), u, v, marginal(u, v))
            offsets[i] = torch.from_numpy(columns - np.arange(len(columns)))
        return offsets.to(x.device)

    def contains(self, x_adv: Tensor, x: Tensor, coupling: Tensor | None = None) -> Tensor:
        """(N,) bool. Finite and in [0, 1], and the coupling pairs every patch with one, at no more than the radius;
        summed anew in double precision, by other code than that which found it."""
        inside = in_box(x_adv)
        if self.radius is None:
            return inside
        return inside & self._affords(x_adv, x, self.coupling(x_adv, x) if coupling is None else coupling)

    def _affords(self, x_adv: Tensor, x: Tensor, coupling: Tensor) -> Tensor:
        limit = math.inf if self.radius is None else self.radius + TOLERANCE
        fits = [
            self._price(*images) <= limit
            for images in zip(*(part.detach().cpu().numpy() for part in (x_adv, x, coupling)), strict=True)
        ]
        return torch.tensor(fits, device=x.device)

    def _price(self, x_adv: np.ndarray, x: np.ndarray, offsets: np.ndarray) -> float:
        """Mean l1 per number of the pairs of one image (C x H x W); infinite where they are no pairing."""
        stride, shape = grid_stride(x.shape, self.window), (x.shape[0], self.window, self.window)
        one, other = (
            np.lib.stride_tricks.sliding_window_view(part.astype(np.float64), shape)[0, ::stride, ::stride]
            .reshape(-1, math.prod(shape)) for part in (x, x_adv)
        )  # fmt: skip
        partner = offsets + np.arange(len(offsets))
        if not np.array_equal(np.sort(partner), np.arange(len(one))):
            return math.inf
        return float(np.abs(one - other[partner]).mean())

    def shown(self, x_adv: Tensor, x: Tensor) -> Shown:
        """What an attack hands over."""
        return Shown(x_adv, None if self.radius is None else self.coupling(x_adv, x))

    def drawn_back(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Images outside brought towards the clean ones along the line, to where the budget has them."""
        inside = self.contains(x_adv, x)
        if bool(inside.all()):
            return x_adv
        share, rows = torch.where(inside, 1.0, 0.0).to(x), (~inside).nonzero()[:, 0]
        far = torch.ones_like(share)
        for _ in range(HALVINGS):
            middle = (share[rows] + far[rows]) / 2
            fits = self.contains(torch.lerp(x[rows], x_adv[rows], middle.view(-1, 1, 1, 1)), x[rows])
            share[rows], far[rows] = share[rows].where(~fits, middle), far[rows].where(fits, middle)
        nearer = torch.lerp(x, x_adv, share.view(-1, 1, 1, 1))
        return x_adv.where(inside.view(-1, 1, 1, 1), nearer)

    def __str__(self) -> str:
        size = f"{self.window}x{self.window} patches"
        return f"IWD, no limit, {size}" if self.radius is None else f"IWD {self.radius:g}, {size}"


def check_pictures(name: str, x: Tensor, goal: Goal, window: int) -> None:
    """Raises UserError where no patch fits into the pictures, or a target is the label that it should replace."""
    height, width = x.shape[-2:]
    if min(height, width) < window:
        raise UserError(f"{name}: pictures of {height}x{width} are smaller than a patch of {window}x{window}")
    if goal.targets is not None and bool((goal.targets == goal.labels).any()):
        at = int((goal.targets == goal.labels).nonzero()[0, 0])
        raise UserError(
            f"{name}: a target must differ from the label, and picture {at} has {int(goal.labels[at])} twice"
        )


def standing(view: View, x: Tensor, goal: Goal, cost: Cost) -> Tensor:
    """Positions (long) of the pictures that do not reach the goal as they are: one query each. All of them on a view
    that cannot tell, at no cost."""
    if not view.exact:
        return torch.arange(len(x), device=x.device)
    with torch.no_grad():
        reached = goal.reached(view.labels(view.logits(x), x))
    cost.queries += 1
    return (~reached).nonzero()[:, 0]


def nearest_success(
    view: View, x: Tensor, goal: Goal, candidates: Iterable[Tensor], budget: IWDBudget, cost: Cost
) -> Tensor:
    """Of several candidates for each image (each N x C x H x W), cut to the budget, the success that is `apart` the
    least; without one, and on a view that cannot tell success, that of the highest margin. One query each."""
    out, least = x.clone(), x.new_full((len(x),), torch.inf)
    highest = torch.full_like(least, -torch.inf)
    for candidate in candidates:
        x_adv = budget.drawn_back(candidate, x)
        with torch.no_grad():
            logits = view.logits(x_adv)
            hit = goal.reached(view.labels(logits, x_adv)) & view.exact
            distance = torch.where(hit, apart(x_adv, x, budget.window), torch.inf)
        cost.queries += 1
        value = margin(logits, goal)
        better = torch.where(hit | least.isfinite(), distance < least, value > highest)
        out[better], least[better] = x_adv[better], distance[better]
        highest = torch.maximum(highest, value)
    return out


def charge(cost: Cost, rows: Tensor, spent: Cost) -> None:
    """Add what was spent on the pictures at `rows`."""
    at = rows.cpu()
    cost.forwards[at] += spent.forwards
    cost.backwards[at] += spent.backwards
    cost.queries[at] += spent.queries
