"""Square attack (Andriushchenko et al. 2020): random search with squares, on scores alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.chunk import Chunk, Rows
from casemate.fields import Count, Flag, Unit, spec
from casemate.objectives import margin
from casemate.system import Offer, View
from casemate.threat import Goal, ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these queries, of 10,000, the share of pixels is halved."""
BLOCK = 128
"""Queries whose noise is drawn at once."""


def side(query: int, share: float, height: int, width: int, rescaled: int | None = None) -> int:
    """Side of the square at a query: it covers `share` of the image, halved as `HALVINGS` says. With `rescaled`
    queries in all these are scaled from 10,000 to that number."""
    at = query if rescaled is None else query * 10_000 // rescaled
    share /= 2 ** sum(at > h for h in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


@dataclass(frozen=True)
class Draw:
    """The noise of one query for all images of a chunk: every image has its own."""

    corners: Tensor
    """N x 4 in [0, 1): row and column of the square; in l2 also of the window that gives up its budget."""
    signs: Tensor
    """N x C, 1 or -1."""
    turned: Tensor
    """(N,) bool: whether the pattern of l2 lies on its side."""

    def __getitem__(self, rows: Tensor) -> Draw:
        return Draw(self.corners[rows], self.signs[rows], self.turned[rows])


def draws(x: Tensor, rng: torch.Generator, queries: int) -> Iterator[Draw]:
    """One `Draw` for each query, in blocks, so that a GPU is fed seldom."""
    n, channels = x.shape[:2]
    for start in range(0, queries, BLOCK):
        noise = torch.rand((min(BLOCK, queries - start), n, 5 + channels), generator=rng).to(x)
        for one in noise:
            yield Draw(one[:, :4], _signs(one[:, 5:]), one[:, 4] < 0.5)


def _signs(uniform: Tensor) -> Tensor:
    """1 or -1, each for half of [0, 1)."""
    return (uniform < 0.5).to(uniform) * 2 - 1


Window = tuple[Tensor, Tensor, Tensor, Tensor]


def window(corners: Tensor, size: int, shape: torch.Size) -> Window:
    """The index of a `size` x `size` square in every image of `shape` L x C x H x W; corners are L x 2 in [0, 1)."""
    n, channels, height, width = shape
    room = torch.tensor([height - size + 1, width - size + 1], device=corners.device)
    at = (corners * room).long().minimum(room - 1)
    along = torch.arange(size, device=corners.device)
    return (
        torch.arange(n, device=corners.device).view(n, 1, 1, 1),
        torch.arange(channels, device=corners.device).view(1, channels, 1, 1),
        (at[:, :1] + along).view(n, 1, size, 1),
        (at[:, 1:] + along).view(n, 1, 1, size),
    )


# --- the two norms ------------------------------------------------------------------------------------------------


def stripes(x: Tensor, radius: float, rng: torch.Generator) -> Tensor:
    """linf start: every column of every channel moved by the radius, up or down."""
    n, channels, _, width = x.shape
    signs = _signs(torch.rand((n, channels, 1, width), generator=rng).to(x))
    return (x + radius * signs).clamp_(0, 1)


def linf_proposal(best: Tensor, x: Tensor, radius: float, size: int, draw: Draw) -> tuple[Window, Tensor]:
    """A square and what it would hold: the clean pixels moved by the radius, one sign for each channel."""
    index = window(draw.corners[:, :2], size, x.shape)
    return index, (x[index] + radius * draw.signs[:, :, None, None]).clamp_(0, 1)


def bump(height: int, width: int) -> Tensor:
    """Height x width weights that fall from the middle in square rings: sum of 1 / j^2 over j > ring."""
    rows, columns = ((torch.arange(size) - size // 2).abs() for size in (height, width))
    weights = 1 / torch.arange(1, max(height, width) // 2 + 2).square()
    tail = weights.flip(0).cumsum(0).flip(0)
    return tail[torch.maximum(rows[:, None], columns[None])]


def pattern(size: int) -> Tensor:
    """The update of l2: two bumps of opposite sign and equal length, one above the other, together of length 1."""
    above, below = bump(size // 2, size), bump(size - size // 2, size)
    both = torch.cat([above / above.norm(), -below / below.norm()])
    one: Tensor = both / both.norm()
    return one


def tiles(x: Tensor, radius: float, rng: torch.Generator) -> Tensor:
    """l2 start: patterns of random signs, about five in a row, together of the radius's length."""
    n, channels, height, width = x.shape
    size = max(min(height, width) // 5, 1)
    one = pattern(size).to(x)
    down, across = height // size, width // size
    noise = torch.rand((n, channels + 1, down, across), generator=rng).to(x)
    turned = (noise[:, :1] < 0.5)[..., None, None]
    patterns = _signs(noise[:, 1:])[..., None, None] * torch.where(turned, one.T, one)
    block = patterns.transpose(3, 4).reshape(n, channels, down * size, across * size)
    delta = torch.zeros_like(x)
    top, left = (height - down * size) // 2, (width - across * size) // 2
    delta[:, :, top : top + down * size, left : left + across * size] = block
    return (x + radius * delta / _length(delta, (1, 2, 3))).clamp_(0, 1)


def l2_proposal(best: Tensor, x: Tensor, threat: ThreatModel, size: int, draw: Draw) -> Tensor:
    """Algorithm 3 of the paper: the window's change is bent by a pattern, and gets the length that it had, that the
    second window had, which is cleared, and what the ball has left, shared between the channels."""
    delta, channels = best - x, x.shape[1]
    here, there = (window(draw.corners[:, i : i + 2], size, x.shape) for i in (0, 2))
    before, one = delta[here], pattern(size).to(x)
    bend = draw.signs[:, :, None, None] * torch.where(draw.turned.view(-1, 1, 1, 1), one.T, one)
    unused = (threat.radius**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / channels
    energy = before.square().sum((2, 3), keepdim=True)
    delta[here] = 0
    length = (energy + delta[there].square().sum((2, 3), keepdim=True) + unused).sqrt()
    bend = bend + before / _length(before, (2, 3))
    delta[there] = 0
    delta[here] = bend / _length(bend, (2, 3)) * length
    return threat.project(x + delta, x)


def _length(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.square().sum(dims, keepdim=True).sqrt_().clamp_min(1e-12)


# --- the search ---------------------------------------------------------------------------------------------------


@dataclass
class _Live(Rows):
    """The images that are still searched."""

    x: Tensor
    goal: Goal
    best: Tensor
    value: Tensor
    """(L,) margin of `best`."""
    logits: Tensor
    fallen: Tensor


class Search:
    """The random search on the images of a chunk that stand. On an exact view an image falls with its first
    success, and leaves at once; on any other all queries are made."""

    def __init__(self, chunk: Chunk, queries: int, share: float = 0.8, rescale: bool = False) -> None:
        self.chunk, self.queries, self.share = chunk, queries, share
        self.rescaled = queries if rescale else None

    def run(self) -> None:
        """One query for the start, then `queries`."""
        chunk, rng = self.chunk, self.chunk.noise("square")
        if not bool(chunk.standing.any()):
            return
        live, unpaid = self._start(rng), 1
        height, width = chunk.x.shape[2:]
        for number, draw in enumerate(draws(chunk.x, rng, self.queries)):
            live, unpaid = self._drop(live, unpaid)
            if not len(live):
                return
            self._query(live, side(number, self.share, height, width, self.rescaled), draw[live.rows])
            unpaid += 1
        chunk.pay(live.rows, queries=unpaid)
        self._offer(live)

    def _start(self, rng: torch.Generator) -> _Live:
        chunk, rows = self.chunk, self.chunk.rows()
        make = stripes if chunk.threat.norm == "linf" else tiles
        best = make(chunk.x, chunk.threat.radius, rng)[rows]
        goal, logits = chunk.goal[rows], chunk.query(best)
        hit = chunk.hit(goal, logits, best)
        return _Live(rows, chunk.x[rows], goal, best, margin(logits, goal), logits, hit)

    def _query(self, live: _Live, size: int, draw: Draw) -> None:
        """Try one change, and keep it where the margin rises. In linf a square is written in place and taken back."""
        chunk = self.chunk
        if chunk.threat.norm == "linf":
            index, new = linf_proposal(live.best, live.x, chunk.threat.radius, size, draw)
            old = live.best[index]
            live.best[index] = new
            better = self._look(live, live.best)
            live.best[index] = torch.where(better.view(-1, 1, 1, 1), new, old)
            return
        size = max(size, 3) // 2 * 2 + 1
        size = min(size, *(s - 1 + s % 2 for s in live.x.shape[2:]))
        tried = l2_proposal(live.best, live.x, chunk.threat, size, draw)
        better = self._look(live, tried)
        live.best = torch.where(better.view(-1, 1, 1, 1), tried, live.best)

    def _look(self, live: _Live, tried: Tensor) -> Tensor:
        """(L,) bool: where the margin rises, or the image falls."""
        logits = self.chunk.query(tried)
        values = margin(logits, live.goal)
        better = values > live.value
        if self.chunk.view.exact:
            live.fallen = self.chunk.hit(live.goal, logits, tried)
            better = better | live.fallen
        live.value = torch.where(better, values, live.value)
        live.logits = torch.where(better[:, None], logits, live.logits)
        return better

    def _drop(self, live: _Live, unpaid: int) -> tuple[_Live, int]:
        if not self.chunk.view.exact or not bool(live.fallen.any()):
            return live, unpaid
        self.chunk.pay(live.rows, queries=unpaid)
        self._offer(live[live.fallen])
        return live[~live.fallen], 0

    def _offer(self, live: _Live) -> None:
        self.chunk.offer(live.rows, live.best, live.logits, live.fallen)


@spec
class Square(Attack):
    """Square attack on the margin, in the form that AutoAttack uses: 5,001 queries for an image that stands.

    Against the authors' code: every image has squares of its own, where theirs share one in a batch, so that no image
    depends on another; and squares reach the last row and column. Scores are all it needs.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"scores"})

    queries: Count = 5000
    """Beside the one for the start."""
    share: Unit = 0.8
    """Of the pixels in the first squares."""
    rescale: Flag = False
    """Scale the schedule of shrinking squares from 10,000 to `queries`; AutoAttack does not."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        chunk = Chunk(view, x, goal, threat, seed, cost)
        Search(chunk, self.queries, self.share, self.rescale).run()
        return chunk.out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n * (self.queries + 1)
