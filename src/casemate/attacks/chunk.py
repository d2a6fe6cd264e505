"""The images of one call: what has been found for each of them, and which still stand.

Attacks of several runs (restarts, targets, the stages of AutoAttack) share one `Chunk`, so that every run is made on
survivors only, and noise drawn for the whole chunk keeps an image's result apart from what becomes of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from casemate.attacks.base import Cost
from casemate.objectives import Objective, margin
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, Norm, ThreatModel

R = TypeVar("R", bound="Rows")


@dataclass
class Rows:
    """Tensors, and goals, of one entry for each image in a batch. Indexing takes the same images of every one."""

    rows: Tensor
    """(L,) long: positions in the chunk."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self: R, index: Tensor) -> R:
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


class Chunk:
    """N images and the best that was found for each.

    On a view whose arg max is the system's decision an image falls with its first success, and is searched no more.
    On any other view success cannot be seen: all N images stay, and `score` says which point is the best. It also
    decides what an image that stands is left with.
    """

    def __init__(
        self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost, score: Objective = margin
    ) -> None:
        self.view, self.x, self.goal, self.threat, self.seed, self.cost = view, x, goal, threat, seed, cost
        self.score = score
        self.out = x.clone()
        self.value = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        self.standing = torch.ones(len(x), dtype=torch.bool, device=x.device)

    def rows(self) -> Tensor:
        """Positions (long) of the images that stand."""
        return self.standing.nonzero()[:, 0]

    def noise(self, *use: object) -> torch.Generator:
        """The generator of one use. Draw for all N images, then take the rows."""
        return generator(self.seed, *use)

    def query(self, points: Tensor) -> Tensor:
        """Logits without a gradient. The caller pays."""
        with torch.no_grad():
            return self.view.logits(points)

    def hit(self, goal: Goal, logits: Tensor, points: Tensor) -> Tensor:
        """(L,) bool: whether the view decides as the goal wants, its logits being known."""
        return goal.reached(self.view.labels(logits, points))

    def offer(self, rows: Tensor, points: Tensor, logits: Tensor, fallen: Tensor) -> None:
        """Points (L x C x H x W) of the images at `rows`, what the view says of them, and which succeed (L,): these
        are kept, and the others where they are the best so far. `fallen` counts on an exact view only."""
        values = self.score(logits, self.goal[rows])
        better = values > self.value[rows]
        if self.view.exact:
            better = better | fallen
            self.standing[rows] &= ~fallen
        self.out[rows] = torch.where(better.view(-1, 1, 1, 1), points, self.out[rows])
        self.value[rows] = torch.where(better, values.to(self.value), self.value[rows])

    def look_at_clean(self) -> Tensor:
        """Logits (N x classes) of the clean images: one query each. Those that are wrong already fall."""
        rows = self.rows()
        logits = self.query(self.x)
        self.pay(rows, queries=1)
        self.offer(rows, self.x, logits, self.hit(self.goal, logits, self.x))
        return logits

    def pay(self, rows: Tensor, forwards: int = 0, backwards: int = 0, queries: int = 0) -> None:
        """Count passes of the view that were made for every image at `rows`."""
        at = rows.cpu()
        self.cost.forwards[at] += forwards * self.view.passes[0]
        self.cost.backwards[at] += backwards * self.view.passes[1]
        self.cost.queries[at] += queries


def unit_noise(norm: Norm, x: Tensor, rng: torch.Generator) -> Tensor:
    """Random directions like `x` whose norm is exactly 1: uniform in the cube over its largest entry in linf,
    Gaussian over its length in l2 (the starts of APGD and FAB)."""
    draw = (
        torch.rand(x.shape, generator=rng).mul_(2).sub_(1) if norm == "linf" else torch.randn(x.shape, generator=rng)
    )
    flat = draw.flatten(1)
    length = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
    return (draw / length.clamp_min(1e-12).view(-1, 1, 1, 1)).to(x)
