"""Attacks that climb two things at once: the class, and what a detector or another part of inference says.

Their face answers N x (classes + 1): the logits, and the part's own logit in the last column. The weight between the
two is each image's own, so one ascent serves a whole search for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.engine import Climb, Plan
from casemate.errors import UserError
from casemate.fields import Count, Flag, Positive, spec
from casemate.objectives import Objective, objective
from casemate.seeding import derive
from casemate.system import REJECT, Detector, Offer, View
from casemate.threat import Goal, ThreatModel


@dataclass(frozen=True)
class Weighted(Goal):
    """A goal with the weight (N,) that each image gives to the second term."""

    weight: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Weighted:
        goal = super().__getitem__(index)
        return Weighted(goal.labels, goal.targets, None if self.weight is None else self.weight[index])


@dataclass
class Rounds:
    """Several ascents of one face, each on the images that the ones before left standing.

    The face is exact, so a round ends for an image with its first success; the last iterate of each round but the
    last is judged by one query.
    """

    view: View
    x: Tensor
    threat: ThreatModel
    seed: int
    cost: Cost

    def __post_init__(self) -> None:
        self.x_adv = self.x.clone()
        self.rows = torch.arange(len(self.x), device=self.x.device)

    def ascend(self, goal: Goal, plan: Plan, number: int, last: bool) -> Tensor | None:
        """One ascent. Returns the face's answers (L x (classes + 1)) on the images that still stand, `rows`; None
        after the last round, or if none stands."""
        climb = Climb(
            self.view, self.x, goal, self.threat, derive(self.seed, "round", number), self.cost, plan, self.rows
        )
        found = climb.run()
        self.x_adv[self.rows] = found[self.rows]
        self.rows = climb.standing
        if last or not len(self.rows):
            return None
        with torch.no_grad():
            answers = self.view.logits(self.x_adv[self.rows])
        self.cost.queries[self.rows.cpu()] += 1
        stands = ~goal[self.rows].reached(self.view.labels(answers, self.x_adv[self.rows]))
        self.rows = self.rows[stands]
        return answers[stands] if len(self.rows) else None


@spec
class Joint(Attack):
    """Joint attack on a classifier and its detector (Carlini & Wagner 2017, "Not easily detected"; ATTACKS 9.5).

    Maximises the class objective - c x the detector's logit, which is above 0 where the image is flagged. c starts
    in the middle of its range and is bisected, in logarithms and for each image: up where the image ended wrongly
    classified and flagged, down where it ended unflagged or neither. Success is a wrong class that is not flagged.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"gradient", "detector"})

    steps: Count = 40
    relative_step: Positive | None = None
    """Step size over radius; by default 2.5 / steps."""
    random_start: Flag = True
    objective: Literal["ce", "margin"] = "margin"
    rounds: Count = 5
    """Values of c tried on an image that does not fall."""
    lowest: Positive = 0.01
    highest: Positive = 100.0

    def __post_init__(self) -> None:
        if self.lowest > self.highest:
            raise UserError(f"Joint: lowest ({self.lowest}) is above highest ({self.highest})")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        detector = _detector(view)
        size = threat.radius * (self.relative_step or 2.5 / self.steps)
        plan = Plan(_weighted(objective(self.objective)), self.steps, size, random_start=self.random_start)
        rounds = Rounds(detected(view, detector), x, threat, seed, cost)
        low = torch.full((len(x),), math.log(self.lowest), device=x.device)
        high = torch.full_like(low, math.log(self.highest))
        for number in range(self.rounds):
            middle = (low + high) / 2
            aim = Weighted(goal.labels, goal.targets, middle.exp())
            answers = rounds.ascend(aim, plan, number, last=number == self.rounds - 1)
            if answers is None:
                break
            rows = rounds.rows
            wrong = goal[rows].reached(answers[:, :-1].argmax(1))
            low[rows[wrong]] = middle[rows[wrong]]  # it stands, so it is flagged
            high[rows[~wrong]] = middle[rows[~wrong]]
        return rounds.x_adv

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.steps * self.rounds
        forwards, backwards = _detector(view).passes if view.system is not None else view.passes
        return looks * forwards, looks * backwards, n * (self.rounds - 1)


def _detector(view: View) -> Detector:
    found = None if view.system is None else view.system.detector
    if found is None:
        raise UserError("attack Joint is on a detector, and the system attacked has none")
    return found


def detected(view: View, detector: Detector) -> View:
    """The face "joint": N x (classes + 1) logits, the detector's last; exact, since it shows both."""

    def logits(x: Tensor) -> Tensor:
        flag, classes = detector.readout(x)
        return torch.cat([classes, flag[:, None]], dim=1)

    def read(out: Tensor, _: Tensor) -> Tensor:
        return torch.where(out[:, -1] > 0, REJECT, out[:, :-1].argmax(1))

    return replace(view, name="joint", logits=logits, exact=True, read=read, passes=detector.passes)


def _weighted(base: Objective) -> Objective:
    def value(out: Tensor, goal: Goal) -> Tensor:
        assert isinstance(goal, Weighted) and goal.weight is not None
        return base(out[:, :-1], goal) - goal.weight * out[:, -1]

    return value
