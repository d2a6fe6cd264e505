"""Attacks with rotations: EOT, whose perturbation must work at every angle, and rotating until the system errs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from casemate.attacks.ascent import l2_step, projector, sign_step
from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.warping import RotationBudget, rotate
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.objectives import Objective, objective
from casemate.seeding import generator
from casemate.system import Offer, System, View
from casemate.threat import Goal, ThreatModel


@spec
class EOTRotation(Attack):
    """Expectation over rotations (Athalye et al. 2018) inside the threat model: each step climbs the mean loss of
    `rotations` copies, turned by fresh angles.

    A success is a wrong decision on the image as it is, not turned; `wrong_when_turned` says how many angles agree.
    The images start at the clean ones.
    """

    steps: Count = 100
    rotations: Count = 10
    """Copies per step; each costs a pass."""
    angle: Positive = 45.0
    """Copies are turned by up to so many degrees either way."""
    step_size: Positive | None = None
    """In pixel units; by default an eighth of the radius, 1/255 at 8/255."""
    objective: Literal["ce", "margin"] = "ce"
    keep: Literal["best", "last"] = "best"
    """`best` asks one query per step whether the image has fallen, and stops there; `last` climbs to the end, so
    that the perturbation holds at more angles."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return _Expectation(self, view, x, goal, threat, seed, cost).run()

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        copies = n * self.steps * self.rotations
        looks = 0 if self.keep == "last" else self.steps if view.exact else self.steps + 1
        return copies * view.passes[0], copies * view.passes[1], n * looks


@dataclass
class _Expectation:
    """One EOT run of a chunk. `best` is the highest objective of the image as it is; on an exact view the search of
    an image ends with its first success."""

    attack: EOTRotation
    view: View
    x: Tensor
    goal: Goal
    threat: ThreatModel
    seed: int
    cost: Cost

    def run(self) -> Tensor:
        attack, watch = self.attack, self.attack.keep == "best"
        self.out, self.best = self.x.clone(), self.x.new_full((len(self.x),), -torch.inf)
        self.loss: Objective = objective(attack.objective)
        size = attack.step_size or self.threat.radius / 8
        rows, x_adv = torch.arange(len(self.x), device=self.x.device), self.x.clone()
        for t in range(attack.steps):
            angles = torch.rand(attack.rotations, len(self.x), generator=generator(self.seed, "angles", t))
            if watch:
                standing = ~self._fallen(rows, x_adv)
                rows, x_adv = rows[standing], x_adv[standing]
                if not len(rows):
                    return self.out
            turns = (2 * angles.to(self.x) - 1) * attack.angle
            gradient = self._gradient(rows, x_adv, turns[:, rows])
            climb = sign_step(gradient) if self.threat.norm == "linf" else l2_step(gradient)
            x_adv = projector(self.x[rows], self.threat)(x_adv.add_(climb, alpha=size))
        if watch and not self.view.exact:
            self._fallen(rows, x_adv)
        else:
            self.out[rows] = x_adv
        return self.out

    def _gradient(self, rows: Tensor, x_adv: Tensor, turns: Tensor) -> Tensor:
        """Of the sum of the copies' objectives."""
        total, goal = torch.zeros_like(x_adv), self.goal[rows]
        for turn in turns:
            with torch.enable_grad():
                leaf = x_adv.detach().requires_grad_()
                values = self.loss(self.view.logits(rotate(leaf, turn)), goal)
            total += torch.autograd.grad(values.sum(), leaf)[0]
        self.cost.forwards[rows.cpu()] += len(turns) * self.view.passes[0]
        self.cost.backwards[rows.cpu()] += len(turns) * self.view.passes[1]
        return total

    def _fallen(self, rows: Tensor, x_adv: Tensor) -> Tensor:
        """Look at the images as they are, keep what is better, and say which are finished (L,)."""
        goal = self.goal[rows]
        with torch.no_grad():
            logits = self.view.logits(x_adv)
            value = self.loss(logits, goal)
        self.cost.queries[rows.cpu()] += 1
        fallen = goal.reached(self.view.labels(logits, x_adv)) & self.view.exact
        better = fallen if self.view.exact else value > self.best[rows]
        self.best[rows] = torch.where(better, value, self.best[rows])
        self.out[rows] = torch.where(better.view(-1, 1, 1, 1), x_adv, self.out[rows])
        return fallen


@spec
class RotationTranslation(Attack):
    """The worst of a grid of rotations and shifts (Engstrom et al. 2019; foolbox's SpatialAttack): no gradient, no
    perturbation, black coming in from outside.

    Small motions are tried first, and the first that fools the system is kept; where none does, the clean image.
    Its budget is the rotation: it counts in an lp worst case only where its image happens to lie in the ball.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})

    angle: NonNegative = 30.0
    """Degrees, either way."""
    shift: NonNegative = 3.0
    """Pixels, each way."""
    angles: Count = 5
    """Evenly spaced, the extremes included; one is the middle."""
    shifts: Count = 5
    """For each direction."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        rows = torch.arange(len(x), device=x.device)
        found, motion = x.clone(), x.new_zeros(len(x), 3)
        for step in self.motions():
            tried = x.new_tensor(step).expand(len(rows), 3)
            turned = rotate(x[rows], tried[:, 0], tried[:, 1:]) if any(step) else x[rows]
            hit = goal[rows].reached(view.decide(turned))
            cost.queries[rows.cpu()] += 1
            found[rows[hit]], motion[rows[hit]] = turned[hit], tried[hit]
            rows = rows[~hit]
            if not len(rows):
                break
        return Shown(found, motion)

    def motions(self) -> list[tuple[float, float, float]]:
        """(degrees, right, down) of the whole grid, the smallest first in proportion to what is allowed."""
        turns, moves = _evenly(self.angle, self.angles), _evenly(self.shift, self.shifts)
        scale = self.angle or 1.0, self.shift or 1.0, self.shift or 1.0

        def size(step: tuple[float, float, float]) -> tuple[float, tuple[float, float, float]]:
            return sum((value / most) ** 2 for value, most in zip(step, scale, strict=True)), step

        return sorted(set(product(turns, moves, moves)), key=size)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n * len(self.motions())

    def budget(self, threat: ThreatModel) -> RotationBudget:
        return RotationBudget(self.angle, self.shift)


def _evenly(most: float, count: int) -> list[float]:
    """`count` values from -most to most; the middle alone for one."""
    return [0.0] if count == 1 else [most * (2 * i / (count - 1) - 1) for i in range(count)]


def wrong_when_turned(system: System, x: Tensor, goal: Goal, angle: float = 45.0, angles: int = 31) -> Tensor:
    """(N,) share of `angles` evenly spaced rotations of up to `angle` degrees at which the system decides as the
    goal wants. Asked of clean images it is what rotations alone do, without which EOT's figure says little."""
    wrong = x.new_zeros(len(x))
    with system.frozen():
        for degrees in _evenly(angle, angles):
            wrong += goal.reached(system.decide(rotate(x, x.new_full((len(x),), degrees))))
    return wrong / angles
