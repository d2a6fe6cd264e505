"""IWDA without networks: the sliced patch distance itself is minimised, by the pixels, from coarse to fine.

A cross-check of `iwda`: what it claims of a distance over patches must be found here too, for about a twentieth of
the passes and without the caprices of a GAN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.internal import IWDBudget, apart, charge, check_pictures, standing
from casemate.attacks.minimise import Judge, Live, Parametrisation, Task, Value, minimise
from casemate.attacks.optimizers import Adam
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.iwd import Windows
from casemate.iwd.sliced import directions, sliced
from casemate.networks.patch_pyramid import LARGEST_PYRAMID, Size, pyramid_sizes, resized, size_of
from casemate.objectives import cross_entropy, margin
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, ThreatModel


@dataclass
class _Difference(Parametrisation):
    """What is added to the pictures, at the size of a scale; scaled up, so that they keep their own detail."""

    first: Tensor

    def start(self, x: Tensor) -> Tensor:
        return self.first

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        return added(live.x, variables)

    def project(self, variables: Tensor, live: Live) -> Tensor:
        """Cut so that the picture of this scale stays in [0, 1]."""
        coarse = resized(live.x, size_of(variables))
        return (coarse + variables).clamp(0, 1) - coarse


def added(x: Tensor, difference: Tensor) -> Tensor:
    """`x` with a difference of any size scaled up to it, cut to [0, 1]."""
    return (x + resized(difference, size_of(x))).clamp(0, 1)


@spec
class IWDASliced(Attack):
    """At each scale, Adam on sliced W1 (patches of the changed and the clean picture) - `tau` * min(objective, cap).

    Directions are drawn anew for every step. Of the iterates that succeed, the one whose sliced distance at full size
    is the least is kept.
    """

    tau: NonNegative = 0.1
    """Weight of the classification loss."""
    objective: Literal["ce", "margin"] = "margin"
    cap: NonNegative = 0.5
    """The classification loss pays no further; beyond it the distance alone is minimised."""
    window: Count = 11
    """Side of the patches, at every scale; 7 suits pictures of 32 pixels, 5 those of 28."""
    projections: Count = 64
    """Directions per step."""
    steps: Count = 300
    """Per scale."""
    rate: Positive = 0.01
    """Adam's, in pixel units."""
    start: Positive = 0.01
    """Standard deviation of the first difference: at the picture itself the distance has no slope."""
    coarsest: Count = 25
    """Shorter side of the coarsest scale; 12 suits pictures of 28 and 32 pixels."""
    scales: Count | None = None
    """In all; by default so many that each is about 3/4 of the next."""
    radius: Positive | None = None
    """Hard limit of the exact IWD: what lies beyond is brought back along the line to the picture. None: no limit."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        check_pictures("iwda_sliced", x, goal, self.window)
        out, rows = x.clone(), standing(view, x, goal, cost)
        noise = self.start * torch.randn(x.shape, generator=generator(seed, "start")).to(x)
        if len(rows):
            spent = Cost.zero(len(rows))
            out[rows] = self._descend(view, x[rows], goal[rows], noise[rows], seed, spent)
            charge(cost, rows, spent)
        budget = self.budget(threat)
        return budget.shown(budget.drawn_back(out, x), x)

    def _descend(self, view: View, x: Tensor, goal: Goal, noise: Tensor, seed: int, cost: Cost) -> Tensor:
        """All scales; the best of what was judged, or the last where nothing was acceptable."""
        out, best = x.clone(), x.new_full((len(x),), torch.inf)
        difference = noise
        for scale, size in enumerate(self.sizes(*size_of(x))):
            first, value = _Difference(resized(difference, size)), self._value(seed, scale, x)
            task = Task(first, Adam(self.rate), value, self._judge(view), self.steps)
            found = minimise(task, view, x, goal, cost)
            better = found.score < best
            out[better], best[better] = found.x_adv[better], found.score[better]
            difference = found.last
        return torch.where(best.isfinite().view(-1, 1, 1, 1), out, added(x, difference))

    def _value(self, seed: int, scale: int, x: Tensor) -> Value:
        climbed = cross_entropy if self.objective == "ce" else margin
        count, windows = 0, Windows(size=self.window)

        def value(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
            nonlocal count
            rng = generator(seed, "directions", scale, count)
            count += 1
            along = directions(self.projections, x.shape[1], windows, rng)
            coarse = resized(live.x, size_of(live.variables))
            distance = sliced(coarse, coarse + live.variables, windows, along).value
            return distance - self.tau * climbed(logits, live.goal).clamp(max=self.cap)

        return value

    def _judge(self, view: View) -> Judge:
        """Least is best: the distance at full size of a success, or minus the margin on a view that cannot tell."""

        def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
            if not view.exact:
                return -margin(logits, live.goal)
            hit = live.goal.reached(view.labels(logits, x_adv))
            score = torch.full_like(live.score, torch.inf)
            if bool(hit.any()):
                score[hit] = apart(x_adv[hit], live.x[hit], self.window)
            return score

        return judge

    def sizes(self, height: int, width: int) -> list[Size]:
        """(height, width) of every scale for pictures of a size, coarsest first."""
        largest = max(height, width)
        return pyramid_sizes(height, width, self.scales, coarsest=self.coarsest, largest=largest, patch=self.window)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        scales = LARGEST_PYRAMID if view.system is None else len(self.sizes(*view.system.input_shape[1:]))
        steps = n * scales * self.steps
        return steps * view.passes[0], steps * view.passes[1], n

    def budget(self, threat: ThreatModel) -> IWDBudget:
        return IWDBudget(self.radius, self.window)
