"""Attacks on a system that purifies its input, whatever the purification (ATTACKS 9.4: A2, A3, A5).

The first adaptive attack (A1) is not here: it is any gradient attack on the view "adaptive". An attacker knows the
purification, so all of these may run it on any image; such a run is a query.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.engine import Climb, Plan
from casemate.attacks.gradient import Iterative
from casemate.errors import UserError
from casemate.fields import Count, Flag, Positive, spec
from casemate.objectives import margin, objective
from casemate.seeding import derive
from casemate.system import Offer, Purification, View, noise_averaged
from casemate.threat import Goal, ThreatModel

KNOWS: frozenset[Offer] = frozenset({"gradient", "purification"})


def purification_of(view: View) -> Purification:
    """What stands before the classifier of the view's system. Raises UserError if nothing does."""
    found = None if view.system is None else view.system.purification
    if found is None:
        raise UserError("this attack is on a purification, and the system attacked has none")
    return found


def static_face(view: View) -> View:
    """The classifier alone of the view's system, whose decisions say nothing of the system's."""
    assert view.system is not None
    return replace(view.system.views()["static"], exact=False)


@spec
class StaticAscent(Attack):
    """What the attacks that climb the classifier alone have in common."""

    needs: ClassVar[frozenset[Offer]] = KNOWS

    steps: Count = 40
    relative_step: Positive | None = None
    """Step size over radius; by default 2.5 / steps."""
    restarts: Count = 1
    random_start: Flag = True
    objective: Literal["ce", "margin"] = "ce"

    def __post_init__(self) -> None:
        if self.restarts > 1 and not self.random_start:
            raise UserError(f"{type(self).__name__}: restarts without random_start would repeat one run")

    def plan(self, threat: ThreatModel, restarts: int = 1) -> Plan:
        """The ascent of the classifier."""
        size = threat.radius * (self.relative_step or 2.5 / self.steps)
        return Plan(objective(self.objective), self.steps, size, restarts, self.random_start)


@spec
class AllIterates(StaticAscent):
    """Ascent of the classifier alone, every iterate of which is put through the purification (A5).

    The attack that the static columns of a table are made with, except that any of its steps may be the one that
    fools the whole system; the first that does is kept, and the image left alone from there on.
    """

    steps: Count = 100
    restarts: Count = 5

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        purification_of(view)
        face = replace(static_face(view), exact=True, read=lambda _, x_adv: view.decide(x_adv))
        before = cost.forwards.clone(), cost.queries.clone()
        found = Climb(face, x, goal, threat, seed, cost, self.plan(threat, self.restarts)).run()
        # Each look at the classifier, with or without a gradient, goes with one question to the system.
        cost.queries += (cost.forwards - before[0]) // face.passes[0] + cost.queries - before[1]
        return found

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.steps * self.restarts
        return looks, looks, looks + 2 * n * (self.restarts - 1)


@spec
class PreCompensation(StaticAscent):
    """Points that the purification moves onto a target that fools the classifier (A3), by a fixed-point iteration.

    The target a is the point of the highest loss on the classifier alone; x_in <- project(a - push(x_in)) starts
    at a itself, and of its `iterations` + 1 points the one whose purified margin is the worst is kept. Each restart
    has a target of its own, for the images that still stand.
    """

    iterations: Count = 10

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        purification_of(view)
        found, face, plan = _Found(x, goal), static_face(view), self.plan(threat)
        for restart in range(self.restarts):
            own = derive(seed, "target", restart)
            targets = Climb(face, x, goal, threat, own, cost, plan, found.rows).run()
            self._compensate(view, targets[found.rows], found, threat, cost)
            if not len(found.rows):
                break
        return found.x_adv

    def _compensate(self, view: View, target: Tensor, found: _Found, threat: ThreatModel, cost: Cost) -> None:
        """Search for pre-images of the targets (L x C x H x W) of the images that stand."""
        purification, classifier, x_in = purification_of(view), static_face(view).logits, target
        for _ in range(self.iterations + 1):
            purified, push = purification.moved(x_in)
            with torch.no_grad():
                logits = classifier(purified)
            cost.queries[found.rows.cpu()] += 1
            left = found.offer(x_in, logits)
            target, push = target[left], push[left]
            if not len(target):
                return
            x_in = threat.project(target - push, found.x[found.rows])

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.steps * self.restarts
        return looks, looks, n * self.restarts * (self.iterations + 2)


class _Found:
    """The best point of each of N images by the margin of its purified self, and the rows that still stand."""

    def __init__(self, x: Tensor, goal: Goal) -> None:
        self.x, self.goal, self.x_adv = x, goal, x.clone()
        self.rows = torch.arange(len(x), device=x.device)
        self.value = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)

    def offer(self, points: Tensor, logits: Tensor) -> Tensor:
        """Points (L x C x H x W) for the images that stand, and the system's logits on them. Returns which (L,) bool
        of them stand thereafter."""
        goal = self.goal[self.rows]
        values, hit = margin(logits, goal), goal.reached(logits.argmax(1))
        better = (values > self.value[self.rows]) | hit
        self.x_adv[self.rows[better]] = points[better]
        self.value[self.rows[better]] = values[better]
        self.rows = self.rows[~hit]
        return ~hit


@spec
class NoiseAveraged(Iterative):
    """Ascent of the deployed loss along the mean of its identity-backward gradients in a small neighbourhood (A2).

    Where the purification's direction flips within `noise`, the gradient at one point sees one side only.
    """

    needs: ClassVar[frozenset[Offer]] = KNOWS

    draws: Count = 10
    """Gradients averaged, that at the point itself included."""
    noise: Positive = 0.00392156862745098
    """Standard deviation in pixel units, by default one grey level."""
    objective: Literal["ce", "margin"] = "margin"

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            objective(self.objective), self.steps, self.size(threat), self.restarts, self.random_start,
            self.keep, self.check_every,
        )  # fmt: skip

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        purification_of(view)
        return super().run(noise_averaged(view, self.draws, self.noise, seed), x, goal, threat, seed, cost)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return super().passes(noise_averaged(view, self.draws, self.noise), n)
