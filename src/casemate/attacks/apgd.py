"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness", algorithm 1) and its targeted form.

Projected ascent with momentum, whose step starts at twice the radius and is halved when it no longer pays, by rules
that look at fixed iterations. There is no step size to choose.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from casemate.attacks import diagnostics, engine
from casemate.attacks.ascent import l2_step, projector
from casemate.attacks.base import Attack, Cost
from casemate.attacks.chunk import Chunk, Rows, unit_noise
from casemate.fields import Count, spec
from casemate.objectives import Objective, difference, dlr, objective
from casemate.system import View
from casemate.threat import Goal, ThreatModel, targeted

PULL = 0.75
"""Share of the gradient step in a move; the rest is momentum."""
ENOUGH = 0.75
"""The step is kept if the objective rose in more than this share of a period."""


def checkpoints(steps: int) -> dict[int, int]:
    """{iteration: length of the period it ends}. 100 steps have 22, 41, 57, 70, 80, 87, 93 and 99.

    The first period is 22 % of the steps, each next one 3 % shorter, down to 6 %.
    """
    period, shortest, cut = (max(share * steps // 100, 1) for share in (22, 6, 3))
    marks, at = {}, period
    while at <= steps:
        marks[at] = period
        period = max(period - cut, shortest)
        at += period
    return marks


@dataclass
class _Live(Rows):
    """The images of one run that are still searched: (L,), L x C x H x W, logits L x classes."""

    x: Tensor
    goal: Goal
    aim: Goal
    """What the objective is asked with: the goal, or the target of this run."""
    at: Tensor
    before: Tensor
    slope: Tensor
    value: Tensor
    size: Tensor
    """Step size in pixel units."""
    best: Tensor
    """The iterate of the highest objective; once an image has fallen its first success."""
    best_slope: Tensor
    best_value: Tensor
    best_logits: Tensor
    rises: Tensor
    """How often the objective rose in this period."""
    halved: Tensor
    """Whether the step was halved at the last checkpoint; at first it counts as halved."""
    reached: Tensor
    """The highest objective at the last checkpoint."""
    fallen: Tensor

    def judge(self, logits: Tensor, values: Tensor, chunk: Chunk) -> Tensor:
        """Take in what the view says of the iterate; (L,) bool: where it is now the best."""
        better = values > self.best_value
        if chunk.view.exact:
            newly = chunk.hit(self.goal, logits, self.at)
            better = (better | newly) & ~self.fallen
            self.fallen = self.fallen | newly
        self.rises += values > self.value
        self.value = values
        self.best = torch.where(_wide(better), self.at, self.best)
        self.best_value = torch.where(better, values, self.best_value)
        self.best_logits = torch.where(better[:, None], logits, self.best_logits)
        return better

    def checkpoint(self, period: int) -> None:
        """Halve the step and go on from the best iterate where the period did not pay: too few rises, or nothing
        gained since a checkpoint at which the step was kept."""
        cut = (self.rises <= ENOUGH * period) | (~self.halved & (self.reached >= self.best_value))
        self.size = torch.where(cut, self.size / 2, self.size)
        self.at = torch.where(_wide(cut), self.best, self.at)
        self.slope = torch.where(_wide(cut), self.best_slope, self.slope)
        self.value = torch.where(cut, self.best_value, self.value)
        self.halved, self.reached, self.rises = cut, self.best_value, torch.zeros_like(self.rises)


def _wide(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)


@dataclass
class Climb:
    """One APGD run on the images of a chunk that stand, which keeps its best iterates there.

    Iterates 0 to `steps` are looked at: `steps` forwards with their input gradients, and one query for the last, from
    which no step leads. On an exact view an image pays until it falls.
    """

    chunk: Chunk
    objective: Objective
    steps: int
    use: tuple[object, ...]
    """What the random start is drawn for."""
    aim: Goal | None = None
    """A target for each image of the chunk, if the objective has one that the goal has not."""
    check_every: int = 1

    def run(self) -> Tensor:
        """Positions of the images whose gradient is zero in every pixel at the random start."""
        rows = self.chunk.rows()
        if not len(rows):
            return rows
        live, view, marks = self._start(rows), self.chunk.view, checkpoints(self.steps)
        project, silent, unpaid = projector(live.x, self.chunk.threat), rows[:0], 0
        live.at = project(live.at)
        for t in range(self.steps):
            with torch.enable_grad():
                leaf = live.at.detach().requires_grad_()
                logits = view.logits(leaf)
                values = self.objective(logits, live.aim)
            if t == 0:
                live.best_logits = logits.detach()
            better = live.judge(logits.detach(), values.detach(), self.chunk)
            down = int(live.fallen.sum()) if view.exact and t % self.check_every == 0 else 0
            if down == len(live):
                self.chunk.pay(live.rows, unpaid + 1, unpaid)
                self._offer(live)
                return silent
            (live.slope,) = torch.autograd.grad(values.sum(), leaf)
            live.best_slope = torch.where(_wide(better), live.slope, live.best_slope)
            unpaid += 1
            if t == 0:
                silent = live.rows[~live.slope.flatten(1).any(1)]
            if t in marks:
                live.checkpoint(marks[t])
            if down > engine.COMPACT_ABOVE * len(live):
                self.chunk.pay(live.rows, unpaid, unpaid)
                self._offer(live[live.fallen])
                live, unpaid = live[~live.fallen], 0
                project = projector(live.x, self.chunk.threat)
            self._step(live, project, first=t == 0)
        logits = self.chunk.query(live.at)
        live.judge(logits, self.objective(logits, live.aim), self.chunk)
        self.chunk.pay(live.rows, unpaid, unpaid, queries=1)
        self._offer(live)
        return silent

    def _start(self, rows: Tensor) -> _Live:
        """A random point at the full radius, drawn for the whole chunk, not yet cut to the box."""
        chunk, n = self.chunk, len(rows)
        noise = unit_noise(chunk.threat.norm, chunk.x, chunk.noise(*self.use))
        at = chunk.x.clone().add_(noise, alpha=chunk.threat.radius)[rows]
        low = torch.full((n,), -torch.inf, device=at.device, dtype=at.dtype)
        goal, yes = chunk.goal[rows], torch.ones(n, dtype=torch.bool, device=at.device)
        return _Live(
            rows=rows, x=chunk.x[rows], goal=goal, aim=goal if self.aim is None else self.aim[rows], at=at, before=at,
            slope=at, value=-low, size=torch.full_like(low, 2 * chunk.threat.radius), best=at, best_slope=at,
            best_value=low, best_logits=low, rises=torch.zeros_like(rows), halved=yes, reached=low,
            fallen=~yes,
        )  # fmt: skip

    def _step(self, live: _Live, project: Callable[[Tensor], Tensor], first: bool) -> None:
        """z = project(x + size * direction); x <- project(x + a (z - x) + (1 - a)(x - before)), a = 1 at first."""
        linf = self.chunk.threat.norm == "linf"
        direction = live.slope.sign() if linf else l2_step(live.slope)
        ahead = project(direction.mul_(_wide(live.size)).add_(live.at))
        if not first:  # the storage of the iterate before last is free
            back = live.before.mul_(PULL - 1).add_(live.at, alpha=2 * (1 - PULL))
            ahead = project(back.add_(ahead, alpha=PULL))
        live.before, live.at = live.at, ahead

    def _offer(self, live: _Live) -> None:
        self.chunk.offer(live.rows, live.best, live.best_logits, live.fallen)


def climb_targets(
    chunk: Chunk, clean: Tensor, *, steps: int, targets: int, restarts: int = 1, check_every: int = 1
) -> Tensor:
    """APGD-T on a chunk: a run on the targeted DLR for each target and restart, as `Climb.run` has it.

    `clean` are the logits of the clean images. Below 4 classes, where that loss is not defined, it climbs z_t - z_y.
    """
    aimed = dlr if clean.shape[1] >= 4 else difference
    silent = []
    for rank, target in enumerate(targets_of(chunk.goal, clean, targets).unbind(1)):
        aim = targeted(chunk.goal.labels, target)
        for restart in range(restarts):
            run = Climb(chunk, aimed, steps, ("apgd_t", rank, restart), aim, check_every)
            silent.append(run.run())
    return torch.cat(silent) if silent else chunk.rows()[:0]


def targets_of(goal: Goal, clean: Tensor, most: int) -> Tensor:
    """(N, T) long: the classes of the largest clean logits, the true one left out; the goal's own target alone where
    it has one. T is at most `most` and at most one less than there are classes."""
    if goal.targets is not None:
        return goal.targets[:, None]
    others = clean.scatter(1, goal.labels[:, None], -torch.inf)
    return others.topk(min(most, clean.shape[1] - 1), dim=1).indices


@spec
class APGD(Attack):
    """Auto-PGD (Croce & Hein 2020): momentum, and a step size that halves where progress stalls.

    101 forwards and 100 input gradients for an image that stands.
    Towards a target the objectives are those of the target: `dlr` is then the targeted DLR. It needs 3 classes, and
    4 towards a target; `margin` is the same without its scale. What is returned is the first success, else the
    iterate of the highest objective.
    """

    objective: Literal["ce", "dlr", "margin"] = "ce"
    steps: Count = 100
    restarts: Count = 1
    """Runs from fresh noise, each on the images that still stand."""
    check_every: Count = 1
    """Steps between two looks at which images have fallen; larger saves waiting for a GPU, never changes a result."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        climbed = objective(self.objective)
        chunk = Chunk(view, x, goal, threat, seed, cost, score=climbed)
        for restart in range(self.restarts):
            Climb(chunk, climbed, self.steps, ("apgd", restart), check_every=self.check_every).run()
        return chunk.out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        runs = n * self.restarts
        return runs * self.steps * view.passes[0], runs * self.steps * view.passes[1], runs


@spec
class APGDT(Attack):
    """Targeted APGD: one run on the targeted DLR towards each of the classes that come next on the clean image.

    With fewer than `targets` + 1 classes, towards all others. With fewer than 4, where the targeted DLR is not
    defined, it climbs z_t - z_y and says so. The clean image costs one query.
    """

    targets: Count = 9
    steps: Count = 100
    restarts: Count = 1
    check_every: Count = 1
    """As in `APGD`."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        chunk = Chunk(view, x, goal, threat, seed, cost)
        clean = chunk.look_at_clean()
        for line in diagnostics.class_count(clean, goal.labels):
            warnings.warn(line, diagnostics.AttackWarning, stacklevel=3)
        climb_targets(
            chunk, clean, steps=self.steps, targets=self.targets, restarts=self.restarts, check_every=self.check_every
        )
        return chunk.out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        runs = n * self.targets * self.restarts
        return runs * self.steps * view.passes[0], runs * self.steps * view.passes[1], runs + n
