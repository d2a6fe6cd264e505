"""The sliced distance: mean W1 along random directions. Differentiable, batched, and on a scale of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.errors import UserError
from casemate.iwd.bounds import sphere_constant
from casemate.iwd.windows import Windows


class Sliced(NamedTuple):
    """Never to be compared with the exact distance: it is 0.05 to 0.2 of it (per element) for a perturbed image, and
    near it for unrelated ones."""

    value: Tensor
    """(N,) the mean over directions on the unit l2 sphere of W1 of the projected patches; differentiable."""
    error: Tensor
    """(N,) its standard error over the directions drawn; no gradient."""
    dimension: int

    @property
    def bound(self) -> Tensor:
        """(N,) `value` as a bound of the exact distance per element from below, loose, true up to `error`."""
        return self.value / (sphere_constant(self.dimension) * self.dimension)


def directions(count: int, channels: int, windows: Windows, rng: torch.Generator) -> Tensor:
    """count x C x size x size unit directions (count 2 or more), drawn on the CPU: use the same ones for every attack
    that is to be compared, fresh ones in every step of an optimisation."""
    if count < 2:
        raise UserError(f"a sliced distance needs 2 directions or more to state its error; got {count}")
    drawn = torch.randn(count, channels, windows.size, windows.size, generator=rng)
    length: Tensor = drawn.flatten(1).norm(dim=1)
    return drawn / length.view(-1, 1, 1, 1)


def sliced(x: Tensor, x_adv: Tensor, windows: Windows, theta: Tensor) -> Sliced:
    """The sliced distance of each pair of images N x C x H x W along `theta` (L x C x size x size, see `directions`).

    Unless they are drawn, patches are projected by a convolution and never stored; memory is N * L * windows. The
    gradient is zero where x_adv is x: start an optimisation beside it. Raises UserError on shapes that do not fit.
    """
    expected = (x.shape[1], windows.size, windows.size)
    if x.shape != x_adv.shape or tuple(theta.shape[1:]) != expected:
        raise UserError(
            f"images {tuple(x.shape)} and {tuple(x_adv.shape)} and directions {tuple(theta.shape)} do not fit: "
            f"two batches N x C x H x W of one shape, and directions L x {' x '.join(map(str, expected))}"
        )
    before, after = windows.prepare(x), windows.prepare(x_adv)
    theta = theta.to(x_adv)
    apart = windows.sampling == "independent"
    moved = _project(before, windows, theta, 0) - _project(after, windows, theta, int(apart))
    along = moved.abs().mean(2)
    error = along.detach().std(1) / len(theta) ** 0.5
    return Sliced(along.mean(1), error, theta[0].numel())


def _project(x: Tensor, windows: Windows, theta: Tensor, draw: int) -> Tensor:
    """N x L x n: the patches of each image along each direction, in ascending order."""
    height, width = x.shape[-2:]
    if windows.sampled(height, width):
        along = (windows.patches(x, draw) @ theta.flatten(1).T).transpose(1, 2)
    else:
        along = F.conv2d(x, theta, stride=windows.stride).flatten(2)
    return along.sort(dim=2).values
