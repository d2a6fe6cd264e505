"""FAB-T (Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack"), in the
targeted form that AutoAttack uses: one gradient a step, whatever the number of classes.

Each step projects the iterate and the clean image on the linearised boundary between label and target, goes a little
beyond, and mixes the two, so that it stays near the boundary and is drawn back to the clean image. A point that is
misclassified is moved 10 % of its way back. It has no radius of its own: it looks for the nearest boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from casemate.attacks import engine
from casemate.attacks.apgd import targets_of
from casemate.attacks.base import Attack, Cost
from casemate.attacks.chunk import Chunk, Rows, unit_noise
from casemate.fields import Count, spec
from casemate.objectives import difference, margin
from casemate.system import View
from casemate.threat import Goal, Norm, ThreatModel, targeted

BEYOND = 1.05
"""Length of a move over the distance to the linearised boundary."""
DRAWN_BACK = 0.1
"""Largest share of the clean image's projection in the mixture."""
RETREAT = 0.9
"""Share of the way from the clean image that is left after a success."""
SHORTEST = 1e-8


def to_hyperplane(at: Tensor, normal: Tensor, need: Tensor, norm: Norm) -> Tensor:
    """The shortest move d (K x L x D) with <normal, d> = need that keeps `at` + d in [0, 1]; to the farthest corner
    of the box in that direction if there is none.

    Args:
        at: points in [0, 1], K x L x D. normal: L x D. need: K x L. All K points of an image share its normal.

    Every coordinate moves by min(r * rate, its distance to the wall) with rate 1 in linf, |normal| in l2. What r
    gains is concave and piecewise linear, so Newton's method from r = 0 stays below the root and stops at it after
    a few steps, once no further coordinate meets its wall: no sorting is needed.
    """
    way = normal.sign() * need.sign()[..., None]
    wall = torch.where(way > 0, 1 - at, at)
    steep = normal.abs().expand_as(at)
    need, most = need.abs(), torch.finfo(at.dtype).max
    per_r = steep if norm == "linf" else steep * steep
    blocked, r, free = steep * wall, torch.zeros_like(need), wall > 0
    before, left = -1, int(free.sum())
    while left != before:
        gained = torch.where(free, 0.0, blocked).sum(-1)
        slope = torch.where(free, per_r, 0.0).sum(-1)
        reach = ((need - gained).clamp_min(0) / slope).clamp(max=most)
        r = torch.maximum(r, torch.where(slope > 0, reach, most))
        free = wall > (r[..., None] if norm == "linf" else r[..., None] * steep)
        before, left = left, int(free.sum())
    move = torch.minimum(wall, r[..., None] if norm == "linf" else r[..., None] * steep)
    return way * move


@dataclass
class _Live(Rows):
    """The images of one run that are still searched; images as rows of D numbers."""

    x: Tensor
    at: Tensor
    goal: Goal
    aim: Goal
    nearest: Tensor
    """(L,) smallest distance of a success so far; infinite before there is one."""
    found: Tensor
    """(L,) bool: `kept` holds a point to offer."""
    kept: Tensor
    logits: Tensor
    value: Tensor
    """(L,) margin of `kept`, on a view that is not exact."""


class Search:
    """FAB-T on a chunk. On an exact view an image falls with its first success inside the ball; on any other the
    point of the highest margin inside it is kept. With `everywhere` all steps are made for all images, and each gets
    the nearest point, at whatever distance, that the view decides as the goal wants.

    A step costs a forward with its input gradient, and a query that judges where it led.
    """

    def __init__(
        self, chunk: Chunk, clean: Tensor, steps: int, check_every: int = 1, everywhere: bool = False
    ) -> None:
        self.chunk, self.clean, self.steps, self.check_every, self.everywhere = (
            chunk, clean, steps, check_every, everywhere,
        )  # fmt: skip
        self.rows = chunk.rows()
        self.nearest = torch.full_like(chunk.value, torch.inf)

    def run(self, targets: int, restarts: int) -> None:
        """Towards the classes of the largest clean logits, in that order."""
        with torch.autocast(self.chunk.x.device.type, enabled=False):  # its successes hang on tiny margins
            for rank, target in enumerate(targets_of(self.chunk.goal, self.clean, targets).unbind(1)):
                for restart in range(restarts):
                    self._run(targeted(self.chunk.goal.labels, target), rank, restart)

    def _run(self, aim: Goal, rank: int, restart: int) -> None:
        rows = self.rows if self.everywhere else self.chunk.rows()
        if not len(rows):
            return
        live, unpaid = self._start(rows, aim, rank, restart), 0
        for t in range(self.steps):
            self._judge(live, self._step(live))
            unpaid += 1
            if self.everywhere or not self.chunk.view.exact or t % self.check_every:
                continue
            down = int(live.found.sum())
            if down == len(live):
                break
            if down > engine.COMPACT_ABOVE * len(live):
                self._settle(live, unpaid)
                live, unpaid = live[~live.found], 0
        self._settle(live, unpaid)

    def _start(self, rows: Tensor, aim: Goal, rank: int, restart: int) -> _Live:
        """The clean image; from the second restart on a random point half as far as is still of interest."""
        chunk = self.chunk
        x = chunk.x.flatten(1)[rows]
        at, nearest = x, self.nearest[rows]
        if restart:
            noise = unit_noise(chunk.threat.norm, chunk.x, chunk.noise("fab_t", rank, restart)).flatten(1)[rows]
            far = nearest.clamp(max=chunk.threat.radius)
            at = (x + noise * (far / 2)[:, None]).clamp_(0, 1)
        return _Live(
            rows=rows, x=x, at=at, goal=chunk.goal[rows], aim=aim[rows], nearest=nearest,
            found=torch.zeros_like(rows, dtype=torch.bool), kept=x, logits=self.clean[rows],
            value=torch.full_like(nearest, -torch.inf),
        )  # fmt: skip

    def _step(self, live: _Live) -> Tensor:
        """(1 - a)(at + 1.05 d) + a (x + 1.05 d_x), cut to the box: d and d_x lead to the linearised boundary from the
        iterate and from the clean image, a = |d| / (|d| + |d_x|) up to 0.1."""
        norm = self.chunk.threat.norm
        with torch.enable_grad():
            leaf = live.at.detach().requires_grad_()
            gap = difference(self.chunk.view.logits(self._images(leaf)), live.aim)
        (normal,) = torch.autograd.grad(gap.sum(), leaf)
        gap = gap.detach()
        from_x = gap + (normal * (live.x - live.at)).sum(1)
        both = torch.stack([live.at, live.x])
        moves = to_hyperplane(both, normal, -torch.stack([gap, from_x]), norm)
        lengths = (moves.abs().amax(2) if norm == "linf" else moves.norm(dim=2)).clamp_min(SHORTEST)
        share = (lengths[0] / lengths.sum(0)).clamp(max=DRAWN_BACK)[:, None]
        ahead = torch.add(both, moves, alpha=BEYOND)
        return torch.lerp(ahead[0], ahead[1], share).clamp_(0, 1)

    def _judge(self, live: _Live, ahead: Tensor) -> None:
        """Keep the point if it is the best, and go on from it, or from 90 % of the way where it succeeded."""
        chunk = self.chunk
        logits = chunk.query(self._images(ahead))
        hit = chunk.hit(live.goal, logits, self._images(ahead))
        apart = ahead - live.x
        distance = apart.abs().amax(1) if chunk.threat.norm == "linf" else apart.norm(dim=1)
        closer, inside = hit & (distance < live.nearest), distance <= chunk.threat.radius
        if self.everywhere:
            better = closer
        elif chunk.view.exact:
            better = closer & inside & ~live.found
        else:
            values = margin(logits, live.goal)
            better = inside & (values > live.value)
            live.value = torch.where(better, values, live.value)
        live.nearest = torch.where(closer, distance, live.nearest)
        live.found = live.found | better
        live.kept = torch.where(better[:, None], ahead, live.kept)
        live.logits = torch.where(better[:, None], logits, live.logits)
        live.at = torch.where(hit[:, None], torch.lerp(live.x, ahead, RETREAT), ahead)

    def _settle(self, live: _Live, steps: int) -> None:
        chunk = self.chunk
        chunk.pay(live.rows, steps, steps, steps)
        self.nearest[live.rows] = live.nearest
        found = live[live.found]
        if self.everywhere:
            chunk.out[found.rows] = self._images(found.kept)
        else:
            chunk.offer(found.rows, self._images(found.kept), found.logits, found.found)

    def _images(self, flat: Tensor) -> Tensor:
        return flat.view(len(flat), *self.chunk.x.shape[1:])


@spec
class FABT(Attack):
    """FAB-T as a part of AutoAttack: what counts is a success inside the ball, and the search for an image ends with
    it. An image that stands is left with the clean image.

    Costs a query for the clean image, then `steps` forwards, input gradients and queries for each of the classes that
    come next on it.
    """

    targets: Count = 9
    steps: Count = 100
    restarts: Count = 1
    check_every: Count = 1
    """Steps between two looks at which images have fallen; larger saves waiting for a GPU, never changes a result."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        chunk = Chunk(view, x, goal, threat, seed, cost)
        clean = chunk.look_at_clean()
        Search(chunk, clean, self.steps, self.check_every, everywhere=self.minimum_norm).run(
            self.targets, self.restarts
        )
        return chunk.out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        steps = n * self.targets * self.restarts * self.steps
        return steps * view.passes[0], steps * view.passes[1], steps + n


@spec
class FABNorm(FABT):
    """FAB-T as a minimum-norm attack: the nearest adversarial image that was found, at whatever distance. The radius
    only bounds the random starts of `restarts`, so that one run gives the accuracy at every radius."""

    minimum_norm: ClassVar[bool] = True
