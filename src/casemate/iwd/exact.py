"""The exact distance, as an assignment of patches to patches: nothing is solved where two cheap bounds meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from casemate.errors import UserError
from casemate.iwd.bounds import identity, marginal, marginal_potentials
from casemate.iwd.windows import Windows

LIMIT = 4096
MEET = 1e-12


@dataclass(frozen=True)
class IWD:
    """Distances of N pairs of images, per element of a patch: comparable with mean |x_adv - x|, whatever the size."""

    value: np.ndarray
    """(N,) float64, in pixel units: min over pairings of the mean l1 distance of paired patches, over d."""
    lower: np.ndarray
    upper: np.ndarray
    """(N,) the coordinate-marginal bound, and the cost of pairing patches in their order (at shared places, the mean
    |x_adv - x| inside the windows)."""
    floor: np.ndarray | None
    """(N,) the distance of the clean image from itself under the same two draws, where the draws are independent."""
    windows: Windows
    shape: tuple[int, int, int]
    """(C, H, W) at which the windows were cut, after the scale."""
    count: int
    """Patches of each image."""

    @property
    def dimension(self) -> int:
        """Numbers in a patch, d; `value * dimension` is the distance before it was divided."""
        return self.shape[0] * self.windows.size**2

    @property
    def excess(self) -> np.ndarray:
        """(N,) what may be reported: the value, less the floor where the draws are independent."""
        return self.value if self.floor is None else self.value - self.floor

    def about(self) -> dict[str, Any]:
        """How it was measured, for a table: everything that the figure depends on."""
        w = self.windows
        return {
            "method": "exact", "size": w.size, "stride": w.stride, "scale": w.scale, "sampling": w.sampling,
            "count": self.count, "sampled": w.sampled(*self.shape[1:]), "seed": w.seed, "shape": list(self.shape),
        }  # fmt: skip


def measure(x: Tensor, x_adv: Tensor, windows: Windows, limit: int = LIMIT) -> IWD:
    """The exact distance of each pair of images N x C x H x W in [0, 1].

    One thread, on the CPU; time grows with count^2 * d for near pairs and about count^3 for unrelated ones. Raises
    UserError on shapes that differ, on values that are not finite, and for more than `limit` patches (memory is
    8 * count^2 bytes).
    """
    if x.shape != x_adv.shape or x.dim() != 4:
        raise UserError(f"images must be N x C x H x W twice; got {tuple(x.shape)} and {tuple(x_adv.shape)}")
    if not (bool(x.isfinite().all()) and bool(x_adv.isfinite().all())):
        raise UserError("images hold values that are not finite: they have no distance")
    before, after = (windows.prepare(images.detach().cpu().double()) for images in (x, x_adv))
    channels, height, width = before.shape[1:]
    count = len(windows.places(height, width))
    if count > limit:
        raise UserError(
            f"{count:,} patches an image ({windows}) need {8 * count**2 / 1e6:,.0f} MB and minutes a pair: "
            f"give the windows a count or a scale, or raise the limit of {limit:,}"
        )
    apart = windows.sampling == "independent" and windows.sampled(height, width)
    rows, floors = [], []
    for i in range(len(before)):
        clean = windows.patches(before[i : i + 1])[0].numpy()
        rows.append(transport(clean, windows.patches(after[i : i + 1], draw=int(apart))[0].numpy()))
        if apart:
            floors.append(transport(clean, windows.patches(before[i : i + 1], draw=1)[0].numpy())[0])
    value, lower, upper = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    return IWD(value, lower, upper, np.array(floors) if apart else None, windows, (channels, height, width), count)


def transport(u: np.ndarray, v: np.ndarray) -> tuple[float, float, float]:
    """(exact, lower, upper) distance per element of the uniform measures on the rows of u and v, both n x d.

    Where the bounds meet nothing is solved. n equal weights always have a best coupling that is a pairing.
    """
    lower, upper = marginal(u, v), identity(u, v)
    if upper - lower <= MEET:
        return upper, lower, upper
    cost = cdist(u, v, "cityblock")
    pairing = assign(cost, u, v, lower)
    # patches that are paired in their order are added up in another order: rounding must not break the bounds
    exact = float(cost[np.arange(len(cost)), pairing].mean()) / u.shape[1]
    return min(exact, upper), min(lower, exact), upper


def assign(cost: np.ndarray, u: np.ndarray, v: np.ndarray, lower: float) -> np.ndarray:
    """(n,) the column of each row in a cheapest pairing; `cost` is the l1 distance of the rows of u and v (n x d).

    The nearest patch of each patch is the answer if no two share it. Where the marginals' bound `lower` is above the
    one of the nearest patches (unrelated and shifted images), their dual potentials reduce the cost: the same pairing
    is best, and is found in a half to a tenth of the time. With few patches of many numbers they cost more than that.
    """
    nearest: np.ndarray = cost.argmin(1)
    if len(set(nearest.tolist())) == len(cost):
        return nearest
    if 2 * u.shape[1] <= len(u) and lower * u.shape[1] > cost[np.arange(len(cost)), nearest].mean():
        give, take = marginal_potentials(u, v)
        cost = cost - give[:, None] + take[None, :]
        cost -= cost.min(1, keepdims=True)
        cost -= cost.min(0, keepdims=True)
    columns: np.ndarray = linear_sum_assignment(cost)[1]
    return columns
