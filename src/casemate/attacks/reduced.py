"""Search in bf16, judge in float32: another attack at about half its time, where the hardware multiplies bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from casemate.attacks.apgd import Climb
from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.chunk import Chunk
from casemate.errors import UserError
from casemate.objectives import margin
from casemate.system import View
from casemate.threat import Goal, ThreatModel

FINISH = 20
"""Steps of the APGD in float32 that every survivor meets."""


class ReducedSearch(Attack):
    """`inner`, its search in bf16: `ReducedSearch(AutoAttack())`, or `search: bf16` beside an attack in params.yaml.

    bf16 only proposes. Every image it hands over is decided by a float32 forward (a query); one that had fallen in
    bf16 alone is searched again, all of it in float32; and one that still stands meets 20 steps of APGD on the
    margin in float32. Images, iterates and steps stay float32 throughout: 8 bits would lose a step of 1/255. FAB-T,
    whose successes hang on tiny margins, never leaves float32. Without native bf16 it is right, and slow.

    For attacks inside the ball of the threat model. With `finish` 0, for benchmarks, it only confirms.
    """

    def __init__(self, inner: Attack, finish: int = FINISH) -> None:
        if inner.binds is not None:
            raise UserError(f"{type(inner).__name__} needs its {inner.binds} before its search can be in bf16")
        self.inner, self.finish = inner, finish
        self.needs, self.norms, self.published = inner.needs, inner.norms, inner.published  # type: ignore[misc]

    @property
    def upper_bound(self) -> bool:
        return self.inner.upper_bound or not self.finish

    def accept(self, threat: ThreatModel) -> None:
        self.inner.accept(threat)
        if self.inner.budget(threat) != threat:
            name = type(self.inner).__name__
            raise UserError(f"{name} has a budget of its own, and cannot be finished in the ball: no search: bf16")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        face = replace(view, logits=lambda points: view.logits(points).float())
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            found = self._search(face, x, goal, threat, seed, cost)
            with torch.no_grad():
                down = goal.reached(face.labels(face.logits(found), found)) & view.exact
        stands = ~goal.reached(view.decide(found))
        cost.queries += 2

        def again(rows: Tensor, search: Callable[..., Tensor]) -> None:
            if len(rows):
                part = Cost.zero(len(rows))
                found[rows] = search(view, x[rows], found[rows], goal[rows], threat, seed, part)
                _add(cost, part, rows)

        unconfirmed = (down & stands).nonzero()[:, 0]
        again(unconfirmed, self._anew)
        if len(unconfirmed):
            stands[unconfirmed] = ~goal[unconfirmed].reached(view.decide(found[unconfirmed]))
            cost.queries[unconfirmed.cpu()] += 1
        if self.finish:
            again(stands.nonzero()[:, 0], self._finish)
        return found

    def _search(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        found = self.inner.run(view, x, goal, threat, seed, cost)
        return (found.x_adv if isinstance(found, Shown) else found).detach().clone()

    def _anew(
        self, view: View, x: Tensor, found: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost
    ) -> Tensor:
        """The whole search in float32."""
        return self._search(view, x, goal, threat, seed, cost)

    def _finish(
        self, view: View, x: Tensor, found: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost
    ) -> Tensor:
        """The best of what was `found` and of a climb from a random start, by their margins."""
        chunk = Chunk(view, x, goal, threat, seed, cost)
        logits = chunk.query(found)
        chunk.pay(chunk.rows(), queries=1)
        chunk.offer(chunk.rows(), found, logits, chunk.hit(goal, logits, found))
        Climb(chunk, margin, self.finish, ("finish",)).run()
        return chunk.out

    def parameters(self) -> dict[str, Any]:
        kind = type(self.inner)
        return {
            "inner": f"{kind.__module__}:{kind.__qualname__}", **self.inner.parameters(),
            "search": "bf16", "finish": self.finish,
        }  # fmt: skip

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        """Twice the inner attack's: the bound is for images that have all fallen in bf16 alone."""
        forwards, backwards, queries = (2 * passes for passes in self.inner.passes(view, n))
        steps = n * self.finish
        return forwards + steps * view.passes[0], backwards + steps * view.passes[1], queries + 5 * n


def _add(cost: Cost, part: Cost, rows: Tensor) -> None:
    at = rows.cpu()
    cost.forwards[at] += part.forwards
    cost.backwards[at] += part.backwards
    cost.queries[at] += part.queries
