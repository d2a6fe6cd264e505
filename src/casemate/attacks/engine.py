"""The one loop of the gradient attacks: projected ascent for evaluation, with restarts and early exit.

An attack is a `Plan`: numbers and four hooks (objective, step, normalise, project). What the loop adds to the bare
ascent of `casemate.attacks.ascent`: which iterate is kept, and that images which have fallen are not paid for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from casemate.attacks.ascent import l2_step, per_sample, projector, sign_step
from casemate.attacks.base import Attack, Cost
from casemate.objectives import Objective
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, ThreatModel

COMPACT_ABOVE = 0.1
"""Fallen images leave the batch once they are more than this share of it. Costs change with it, results do not."""

Step = Callable[[Tensor, Tensor | None], Tensor]
"""(gradient, what the step before climbed along or None) -> what this step climbs along, before it is normalised."""


def plain(gradient: Tensor, before: Tensor | None) -> Tensor:
    """The gradient itself."""
    return gradient


def momentum(decay: float) -> Step:
    """m <- decay * m + g / ||g||_1 per sample (Dong et al. 2018, eq. 6)."""

    def step(gradient: Tensor, before: Tensor | None) -> Tensor:
        scaled = gradient / per_sample(gradient.flatten(1).abs().sum(1), gradient)
        return scaled if before is None else scaled.add_(before, alpha=decay)

    return step


@dataclass(frozen=True)
class Plan:
    """What a projected ascent does. The step size is in pixel units; `keep` is explained at `Climb`."""

    objective: Objective
    steps: int
    step_size: float
    restarts: int = 1
    random_start: bool = True
    keep: Literal["best", "last"] = "best"
    check_every: int = 1
    """Steps between two looks at which images have fallen. Success is seen at every iterate all the same."""
    step: Step = plain
    normalise: Callable[[Tensor], Tensor] | None = None
    """By default the steepest direction of the threat model's norm."""
    project: Callable[[Tensor, ThreatModel], Callable[[Tensor], Tensor]] = projector

    def queries(self, exact: bool) -> int:
        """Forwards without a gradient, that judge last iterates (see `Climb`)."""
        if exact:
            return self.restarts - 1
        return 0 if self.keep == "last" and self.restarts == 1 else self.restarts


class ProjectedAscent(Attack):
    """Base of the attacks that are a `Plan`: subclasses say which."""

    @abstractmethod
    def plan(self, threat: ThreatModel) -> Plan:
        """The numbers and hooks for a threat model."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return Climb(view, x, goal, threat, seed, cost, self.plan(threat)).run()

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        plan = self.plan(ThreatModel("linf", 1.0))
        looks = n * plan.steps * plan.restarts
        return looks * view.passes[0], looks * view.passes[1], n * plan.queries(view.exact)


@dataclass
class Live:
    """The images still searched, and every tensor that follows them when others leave: (L,) or L x C x H x W."""

    rows: Tensor
    """Positions in the chunk, long."""
    x: Tensor
    x_adv: Tensor
    goal: Goal
    kept: Tensor
    value: Tensor
    """Highest objective so far; only on a view that is not exact."""
    fallen: Tensor
    climbed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Live:
        return Live(
            self.rows[index], self.x[index], self.x_adv[index], self.goal[index], self.kept[index],
            self.value[index], self.fallen[index], None if self.climbed is None else self.climbed[index],
        )  # fmt: skip

    def judge(self, logits: Tensor, values: Tensor, view: View) -> None:
        """Keep the iterate where it is the first success (exact view), or where it is the best so far (any other)."""
        logits, values = logits.detach(), values.detach()
        if view.exact:
            better = self.goal.reached(view.labels(logits, self.x_adv)) & ~self.fallen
            self.fallen = self.fallen | better
        else:
            better = values > self.value
            self.value = torch.where(better, values, self.value)
        if self.rows.device.type == "cpu" and not bool(better.any()):
            return  # a look that costs nothing here, and would stop a GPU
        self.kept = torch.where(better.view(-1, 1, 1, 1), self.x_adv, self.kept)


@dataclass
class Climb:
    """One projected ascent of a chunk; `run` returns images inside the ball around `x` and in [0, 1].

    Iterate t is judged by the logits of step t's own forward, so k steps cost k forwards and k input gradients per
    restart. The last iterate has no such forward. On an exact view, that of the last restart is returned where
    nothing has succeeded: every other is known to fail, and the verification of the result judges it. Any other last
    iterate is judged by one query, unless there is nothing to choose from.

    What is kept, on a view whose arg max is the system's decision: the first iterate that succeeds (`keep="best"`),
    or the first last iterate of a restart that does (`"last"`); an image that succeeded is not searched further. On
    any other view success cannot be seen: all steps of all restarts are done, and the iterate, or the last iterate,
    of the highest objective is kept.

    Noise is drawn for the whole chunk from (seed, restart): an image's result depends on no other image. `among`
    (positions, long) leaves the other images out, and returns them as they are; `standing` are, after `run`, the
    positions of those that were not seen to fall.
    """

    view: View
    x: Tensor
    goal: Goal
    threat: ThreatModel
    seed: int
    cost: Cost
    plan: Plan
    among: Tensor | None = None

    def run(self) -> Tensor:
        n, device = len(self.x), self.x.device
        self.out = self.x.clone()
        live = Live(
            rows=torch.arange(n, device=device), x=self.x, x_adv=self.x, goal=self.goal, kept=self.out,
            value=torch.full((n,), -torch.inf, device=device), fallen=torch.zeros(n, dtype=torch.bool, device=device),
        )  # fmt: skip
        live = live if self.among is None else live[self.among]
        for restart in range(self.plan.restarts if len(live) else 0):
            live = self._drop_fallen(self._restart(live, restart))
            if len(live):
                live = self._judge_last(live, last=restart == self.plan.restarts - 1)
            if not len(live):
                break
        self.out[live.rows] = live.kept
        self.standing = live.rows
        return self.out

    def _restart(self, live: Live, restart: int) -> Live:
        """All steps of one restart; returns the images that are still in the batch."""
        view, plan, watch = self.view, self.plan, self.plan.keep == "best"
        start = self.threat.random_start(self.x, self._noise(restart)) if plan.random_start else self.x
        project = plan.project(live.x, self.threat)
        live.x_adv, live.climbed, unpaid = project(start[live.rows]), None, 0
        for t in range(plan.steps):
            with torch.enable_grad():
                leaf = live.x_adv.requires_grad_()
                logits = view.logits(leaf)
                values = plan.objective(logits, live.goal)
            live.x_adv = leaf.detach()
            if watch:
                live.judge(logits, values, view)
            down = int(live.fallen.sum()) if watch and view.exact and t % plan.check_every == 0 else 0
            if down == len(live):
                self._pay(live, unpaid + 1, unpaid)
                return live
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
            live.climbed = plan.step(gradient, live.climbed)
            unpaid += 1
            if down > COMPACT_ABOVE * len(live):
                self._pay(live, unpaid, unpaid)
                live, unpaid = self._drop_fallen(live), 0
                project = plan.project(live.x, self.threat)
            live.x_adv = project(live.x_adv.add_(self._direction(live, restart, t), alpha=plan.step_size))
        self._pay(live, unpaid, unpaid)
        return live

    def _judge_last(self, live: Live, last: bool) -> Live:
        exact = self.view.exact
        if (exact and last) or not self.plan.queries(exact):
            live.kept = live.x_adv
            return live
        with torch.no_grad():
            logits = self.view.logits(live.x_adv)
            live.judge(logits, self.plan.objective(logits, live.goal), self.view)
        self.cost.queries[live.rows.cpu()] += 1
        return self._drop_fallen(live)

    def _drop_fallen(self, live: Live) -> Live:
        if not bool(live.fallen.any()):
            return live
        self.out[live.rows[live.fallen]] = live.kept[live.fallen]
        return live[~live.fallen]

    def _direction(self, live: Live, restart: int, t: int) -> Tensor:
        assert live.climbed is not None
        if self.plan.normalise is not None:
            return self.plan.normalise(live.climbed)
        if self.threat.norm == "linf":
            return sign_step(live.climbed)
        direction = l2_step(live.climbed)
        stuck = ~live.climbed.flatten(1).any(1)
        if bool(stuck.any()):  # no slope to follow: a random direction
            noise = torch.randn(self.x.shape, generator=self._noise(restart, "step", t)).to(direction)
            direction = torch.where(stuck.view(-1, 1, 1, 1), l2_step(noise)[live.rows], direction)
        return direction

    def _noise(self, restart: int, *use: object) -> torch.Generator:
        return generator(self.seed, "restart", restart, *use)

    def _pay(self, live: Live, forwards: int, backwards: int) -> None:
        rows = live.rows.cpu()
        self.cost.forwards[rows] += forwards * self.view.passes[0]
        self.cost.backwards[rows] += backwards * self.view.passes[1]
