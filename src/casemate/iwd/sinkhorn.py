"""Entropic transport, for patches too many to assign exactly: it states how far off it can be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from casemate.errors import UserError


class Bracket(NamedTuple):
    """The exact value lies between the two, whatever the number of steps."""

    lower: Tensor
    """(B,) of a feasible dual solution."""
    upper: Tensor
    """(B,) the cost of the plan, rounded so that its marginals fit exactly; the regulariser is not part of it."""

    @property
    def error(self) -> Tensor:
        """(B,) at most this far above the exact value is `upper`."""
        return self.upper - self.lower


def sinkhorn(cost: Tensor, regularisation: float = 0.01, steps: int = 300) -> Bracket:
    """Bounds of the mean cost of the cheapest pairing of each n x n matrix in `cost` (B x n x n, non-negative).

    Log-domain Sinkhorn in float64; the entropic weight falls geometrically from the median cost to `regularisation`
    times it over the first half of the `steps`. For near pairs of images it is slower and far less precise than
    the exact assignment. Raises UserError on what is no batch of square matrices.
    """
    if cost.dim() != 3 or cost.shape[1] != cost.shape[2] or not cost.shape[1]:
        raise UserError(f"costs must be B x n x n; got {tuple(cost.shape)}")
    if not (regularisation > 0 and steps >= 1):
        raise UserError(f"regularisation {regularisation} must be above 0 and steps {steps} 1 or more")
    cost = cost.detach().double()
    batch, n, _ = cost.shape
    middle = cost.flatten(1).median(1).values.clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
    f, g = cost.new_zeros(batch, n, 1), cost.new_zeros(batch, 1, n)
    mass = torch.tensor(n, dtype=torch.float64, device=cost.device).log()
    for step in range(steps):
        weight = middle * regularisation ** min(1.0, 2 * (step + 1) / steps)
        f = -weight * (torch.logsumexp((g - cost) / weight, 2, keepdim=True) - mass)
        g = -weight * (torch.logsumexp((f - cost) / weight, 1, keepdim=True) - mass)
    plan = ((f + g - cost) / weight - 2 * mass).exp()
    return Bracket(_dual(cost, g), (rounded(plan) * cost).flatten(1).sum(1))


def rounded(plan: Tensor) -> Tensor:
    """The plan (B x n x n) moved to uniform marginals, mass 1 (Altschuler et al. 2017, Algorithm 2)."""
    share = 1 / plan.shape[1]
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (share / plan.sum(2, keepdim=True).clamp_min(tiny)).clamp(max=1)
    plan = plan * (share / plan.sum(1, keepdim=True).clamp_min(tiny)).clamp(max=1)
    rows, columns = share - plan.sum(2, keepdim=True), share - plan.sum(1, keepdim=True)
    return plan + rows * columns / rows.sum(1, keepdim=True).clamp_min(tiny)


def _dual(cost: Tensor, g: Tensor) -> Tensor:
    """(B,) the value of the dual pair that `g` (B x 1 x n) becomes by c-transforms: feasible by construction."""
    f = (cost - g).amin(2, keepdim=True)
    g = (cost - f).amin(1, keepdim=True)
    return f.mean((1, 2)) + g.mean((1, 2))
