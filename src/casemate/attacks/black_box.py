"""Attacks without gradients: SPSA reads scores, RayS labels alone. Each image is queried as an endpoint would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.minimise import Estimate, Live, Pixels, Task, at_success, by_margin, minimise, never
from casemate.attacks.optimizers import Adam
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, spec
from casemate.objectives import Objective, capped_margin
from casemate.seeding import generator
from casemate.system import Offer, View
from casemate.threat import Goal, Norm, ThreatModel

BATCH = 1024
"""Images of one call that estimates gradients: speed and memory depend on it, results do not."""


@spec
class SPSA(Attack):
    """Adam on gradients estimated from scores (Uesato et al. 2018): simultaneous perturbation, projected steps.

    Minimises max(kappa - margin, 0). At each step an image is looked at `samples` times, in pairs x +- sigma v along
    random signs v, cut to [0, 1]; and once at x, to see whether it has fallen. On a view that is not exact, the
    iterate of the highest margin is kept.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"scores"})

    steps: Count = 100
    samples: Count = 256
    """Queries of one estimate, an even number; ADT uses 256 to 2048."""
    sigma: Positive = 0.001
    """How far the pairs lie from the image, in pixel units."""
    rate: Positive = 0.01
    """Of Adam: pixel units per step, about."""
    kappa: NonNegative = 50.0

    def __post_init__(self) -> None:
        if self.samples % 2:
            raise UserError(f"SPSA looks at pairs: samples must be even, and is {self.samples}")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        objective = capped_margin(self.kappa)

        def shortfall(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
            return -objective(logits, live.goal)

        task = Task(
            Pixels(threat), Adam(self.rate), shortfall, by_margin(view), self.steps,
            at_success if view.exact else never, self._estimate(view, objective, seed, cost),
        )  # fmt: skip
        found = minimise(task, view, x, goal, cost)
        return torch.where((found.score < torch.inf).view(-1, 1, 1, 1), found.x_adv, found.last)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n * self.steps * (self.samples + 1)

    def _estimate(self, view: View, objective: Objective, seed: int, cost: Cost) -> Estimate:
        pairs = self.samples // 2
        together = max(1, BATCH // self.samples)

        def estimate(live: Live, step: int) -> Tensor:
            slopes = []
            for part in torch.split(torch.arange(len(live), device=live.x.device), together):
                rows = live.rows[part].tolist()
                signs = torch.stack([_signs(pairs, live.x, seed, row, step) for row in rows])

                def value(points: Tensor, goal: Goal = live.goal[part]) -> Tensor:
                    with torch.no_grad():
                        return -objective(view.logits(points), _repeated(goal, points, len(goal.labels)))

                slopes.append(spsa_gradient(value, live.variables[part], signs, self.sigma))
            cost.queries[live.rows.cpu()] += self.samples
            return torch.cat(slopes)

        return estimate


def spsa_gradient(value: Callable[[Tensor], Tensor], x: Tensor, signs: Tensor, sigma: float) -> Tensor:
    """The mean over pairs of (value(x + sigma v) - value(x - sigma v)) / (2 sigma) * v: (L x C x H x W).

    `signs` are the v (L x pairs x C x H x W); `value` takes M x C x H x W images, all of image 0 first, in calls of
    at most `BATCH` images where one image has more. Points are cut to [0, 1].
    """
    total = torch.zeros_like(x)
    per_call = max(1, BATCH // (2 * len(x)))
    for some in torch.split(signs, per_call, dim=1):
        step = sigma * some.to(x)
        points = torch.stack([x[:, None] + step, x[:, None] - step]).clamp_(0, 1)
        higher, lower = value(points.flatten(0, 2)).view(2, *some.shape[:2])
        total += ((higher - lower).view(*some.shape[:2], 1, 1, 1) * some.to(x)).sum(1)
    return total / (2 * sigma * signs.shape[1])


def _signs(pairs: int, x: Tensor, seed: int, row: int, step: int) -> Tensor:
    """Of one image at one step, so that no image's noise depends on another's."""
    draw = torch.randint(0, 2, (pairs, *x.shape[1:]), generator=generator(seed, "spsa", row, step), dtype=torch.int8)
    return (2 * draw - 1).to(x.device)


def _repeated(goal: Goal, points: Tensor, images: int) -> Goal:
    """The goal of each point: two halves, in which all points of an image follow each other."""
    each = torch.arange(images, device=points.device).repeat_interleave(len(points) // (2 * images)).repeat(2)
    return goal[each]


@spec
class RayS(Attack):
    """Ray search by labels alone (Chen & Gu 2020): the direction in {-1, 1}^D along which the decision changes first.

    The signs of one block after another are flipped, blocks halving in size from the whole image down to a pixel; a
    flip is kept where the image is still wrong at the best radius so far, which is then cut down by bisection. All
    images run side by side, each with one query per round wherever its own search stands, so every call is a full
    batch. The first query is the clean image, which is returned where it is wrong, and where no direction was found:
    the search begins from saturated images (black and white pixels), and, if targeted, from one of the target class.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    minimum_norm: ClassVar[bool] = True

    queries: Count = 10000
    """Of each image, at most; the authors' leaderboard has 40000."""
    tolerance: Positive = 0.001
    """Where bisection ends, as a length (l2) along the ray, whose linf length is that over sqrt(D)."""
    stop_inside: Flag = True
    """An image is finished once its distance is inside the threat model. Without it every query goes into smaller
    distances: their mean is the ADBD of the authors."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        out, unpaid = x.clone(), 1
        rays = Rays.first(x, goal, self.tolerance / x[0].numel() ** 0.5)
        done = goal.reached(view.decide(x))
        for _ in range(self.queries - 1):
            if bool(done.any()):
                cost.queries[rays.rows.cpu()] += unpaid
                out[rays.rows[done]] = rays[done].best()
                rays, unpaid = rays[~done], 0
                if not len(rays):
                    return out
            points = rays.points()
            hit = rays.goal.reached(view.decide(points))
            unpaid += 1
            done = hit & (threat.distance(points, rays.x) <= threat.radius) & self.stop_inside
            rays.advance(hit, done)
        cost.queries[rays.rows.cpu()] += unpaid
        out[rays.rows] = rays.best()
        return out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n * self.queries


@dataclass
class Rays:
    """Where the search of each of L images stands. All lengths are linf, in pixel units."""

    rows: Tensor
    x: Tensor
    goal: Goal
    signs: Tensor
    """L x D: the best direction."""
    attempt: Tensor
    """L x D: the direction that is tried, `signs` with one block flipped."""
    radius: Tensor
    """(L,) at which the best direction succeeds; infinite before one has."""
    low: Tensor
    high: Tensor
    bisecting: Tensor
    """(L,) bool: whether the attempt has succeeded at the best radius, and is now followed down from `high`."""
    level: Tensor
    """(L,) long: a block is a 2^-level part of the image; `block` is its number."""
    block: Tensor
    tolerance: float

    @classmethod
    def first(cls, x: Tensor, goal: Goal, tolerance: float) -> Rays:
        """Direction (1, ..., 1), its negative to be tried first."""
        n, device, signs = len(x), x.device, torch.ones_like(x.flatten(1))
        zeros, number = x.new_zeros(n), torch.zeros(n, dtype=torch.long, device=device)
        return cls(
            rows=torch.arange(n, device=device), x=x, goal=goal, signs=signs, attempt=-signs,
            radius=x.new_full((n,), torch.inf), low=zeros, high=zeros, bisecting=number.bool(), level=number,
            block=number.clone(), tolerance=tolerance,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Rays:
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "tolerance"})

    def points(self) -> Tensor:
        """The image to ask about next: half way between the bounds, or the attempt at the best radius (at 1, where
        every pixel is black or white, while there is none)."""
        return self._at(self._asked(), self.attempt)

    def best(self) -> Tensor:
        """The nearest image that has succeeded; the clean one where none has."""
        return self._at(self.radius.nan_to_num(posinf=0.0), self.signs)

    def advance(self, hit: Tensor, taken: Tensor) -> None:
        """Take in whether `points()` succeeded, and choose the next question. `taken`: successes to be kept at
        once, whatever bisection might still gain."""
        asked = self._asked()
        self.high = torch.where(hit, asked, self.high)
        self.low = torch.where(hit, torch.where(self.bisecting, self.low, 0.0), asked)
        ended = self.bisecting & (self.high - self.low <= self.tolerance)
        better = (ended & (self.high < self.radius)) | taken
        self.radius = torch.where(better, self.high, self.radius)
        self.signs = torch.where(better[:, None], self.attempt, self.signs)
        turned = ended | ~(hit | self.bisecting)
        self.bisecting = ~turned
        self._next_block(turned.nonzero()[:, 0])

    def _asked(self) -> Tensor:
        return torch.where(self.bisecting, (self.low + self.high) / 2, self.radius.clamp(max=1.0))

    def _at(self, radius: Tensor, signs: Tensor) -> Tensor:
        return (self.x + (radius[:, None] * signs).view_as(self.x)).clamp_(0, 1)

    def _next_block(self, at: Tensor) -> None:
        pixels = self.signs.shape[1]
        level, block = self.level[at], self.block[at] + 1
        over = block * _block_size(pixels, level) >= pixels
        level = (level + over).clamp(max=(pixels - 1).bit_length())  # from there on a block is one pixel
        block = block.masked_fill(over, 0)
        start = (block * _block_size(pixels, level))[:, None]
        place = torch.arange(pixels, device=at.device)
        flipped = (place >= start) & (place < start + _block_size(pixels, level)[:, None])
        signs = self.signs[at]
        self.attempt[at] = torch.where(flipped, -signs, signs)
        self.level[at], self.block[at] = level, block


def _block_size(pixels: int, level: Tensor) -> Tensor:
    """ceil(pixels / 2^level)."""
    return -(-pixels // (1 << level))
