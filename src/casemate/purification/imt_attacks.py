"""Attacks that know IMT from within: its critic, its gradient and its band (ATTACKS 9.3 and 9.4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.attacks.adaptive import AllIterates, NoiseAveraged, PreCompensation, static_face
from casemate.attacks.ascent import ascend
from casemate.attacks.base import Attack, Cost
from casemate.attacks.engine import Plan
from casemate.attacks.gradient import Iterative
from casemate.attacks.joint import Rounds
from casemate.errors import UserError
from casemate.fields import Count, Flag, Natural, NonNegative, Positive, spec
from casemate.objectives import Objective, capped_margin, objective
from casemate.purification.imt import IMT, Rule
from casemate.seeding import generator
from casemate.system import Offer, View
from casemate.threat import Goal, Norm, ThreatModel


def procedures(rule: Rule) -> dict[str, Attack]:
    """What every evaluation of IMT runs beside its suites, by name: the adaptive procedures, then the attacks of the
    paper's own adaptive table (Qian et al. 2021, Table V), which are weak and marked as published."""
    adaptive: dict[str, Attack] = {
        "all_iterates": AllIterates(),
        "pre_compensation": PreCompensation(),
        "noise_averaged": NoiseAveraged(draws=10),
        "smoothed_sign": SmoothedSign(),
    }
    if rule == "interval":
        adaptive["mask_control"] = MaskControl()
    table: dict[str, Attack] = {
        "table5_joint20": PublishedATLD(),
        "table5_joint20_cw": PublishedATLD(objective="margin"),
        "table5_joint1_fgsm": PublishedATLD(class_steps=1, relative_step=1.0),
        "table5_class20_critic1": PublishedATLD(joint=False, critic_steps=1),
        "table5_class20_critic1_cw": PublishedATLD(joint=False, critic_steps=1, objective="margin"),
        "table5_class1_critic1_fgsm": PublishedATLD(class_steps=1, relative_step=1.0, joint=False, critic_steps=1),
        "table5_critic1": PublishedATLD(class_steps=0, critic_steps=1, critic_relative_step=1.0),
        "table5_critic20": PublishedATLD(class_steps=0, critic_steps=20),
    }
    return {**adaptive, **table}


def imt_of(view: View) -> IMT:
    """The IMT of the view's system. Raises UserError if it has none."""
    found = None if view.system is None else view.system.purification
    if not isinstance(found, IMT):
        raise UserError("this attack is on IMT, and the system attacked has none")
    return found


@spec
class SmoothedSign(Iterative):
    """Ascent of the deployed loss with tanh(g / T) for IMT's sign(g) in the backward pass (A2).

    T starts at `temperature` times each image's median |g|. On ReLU networks g is piecewise constant, and this is
    the identity backward (A1) at a higher price.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"gradient", "critic"})

    temperature: Positive = 1.0
    anneal: Natural = 20
    """Steps after which T is halved; 0 leaves it as it is."""
    objective: Literal["ce", "margin"] = "margin"

    def plan(self, threat: ThreatModel) -> Plan:
        return Plan(
            objective(self.objective), self.steps, self.size(threat), self.restarts, self.random_start,
            self.keep, self.check_every,
        )  # fmt: skip

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        imt, classifier, climbed = imt_of(view), static_face(view).logits, 0

        def logits(x_adv: Tensor) -> Tensor:
            nonlocal climbed
            if not x_adv.requires_grad:
                return view.logits(x_adv)
            halvings = climbed % self.steps // self.anneal if self.anneal else 0
            climbed += 1
            return classifier(imt.smoothed(x_adv, self.temperature * 0.5**halvings))

        face = replace(view, name="smoothed", logits=logits, passes=self._passes(view))
        return super().run(face, x, goal, threat, seed, cost)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return super().passes(replace(view, passes=self._passes(view)), n)

    def _passes(self, view: View) -> tuple[int, int]:
        """Two more backward passes for each step of IMT than the identity backward has."""
        forwards, backwards = view.passes
        return forwards, backwards + 2 * (backwards - 1)


@spec
class MaskControl(Attack):
    """Ascent of the deployed margin that also steers the limited form's mask (A4).

    Let e be how far the critic's logit z lies outside the band, negative within. For each weight c, one ascent
    climbs margin - c max(e, 0), which holds IMT to its half step, and one margin + c min(e, 0), which makes it take
    the whole step. The band is in logits here: a score near 0 or 1 has no slope to come back by. z and its gradient
    are those that IMT computes anyway, so a step costs what it costs on the view "adaptive".
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"gradient", "band"})

    steps: Count = 20
    relative_step: Positive | None = None
    """Step size over radius; by default 2.5 / steps."""
    random_start: Flag = True
    objective: Literal["ce", "margin"] = "margin"
    weights: tuple[Positive, ...] = (0.1, 1.0, 10.0)

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        imt = imt_of(view)
        size = threat.radius * (self.relative_step or 2.5 / self.steps)
        rounds = Rounds(guided(view, imt), x, threat, seed, cost)
        aims = list(self._objectives(imt.band))
        for number, aim in enumerate(aims):
            plan = Plan(aim, self.steps, size, random_start=self.random_start)
            if rounds.ascend(goal, plan, number, last=number == len(aims) - 1) is None:
                break
        return rounds.x_adv

    def _objectives(self, band: tuple[float, float]) -> Iterator[Objective]:
        low, high = (float(torch.tensor(edge).logit(eps=1e-6)) for edge in band)
        for c in self.weights:
            for inside in (True, False):
                yield partial(_steered, objective(self.objective), low, high, c, inside)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        rounds = 2 * len(self.weights)
        looks = n * self.steps * rounds
        return looks * view.passes[0], looks * view.passes[1], n * (rounds - 1)


def _steered(
    base: Objective, low: float, high: float, weight: float, inside: bool, out: Tensor, goal: Goal
) -> Tensor:
    """The objective, and a pull into the band of logits (or out of it) as long as z is on its other side."""
    excess = torch.maximum(low - out[:, -1], out[:, -1] - high)
    pull = -excess.clamp(min=0) if inside else excess.clamp(max=0)
    return base(out[:, :-1], goal) + weight * pull


def guided(view: View, imt: IMT) -> View:
    """The face "guided": N x (classes + 1), the deployed logits with the identity backward, and the critic's z with
    the gradient by which IMT moved."""
    classifier = static_face(view).logits

    def logits(x: Tensor) -> Tensor:
        walk, zero = imt.walk(x), x - x.detach()
        z = walk.z + (walk.gradients[0] * zero).flatten(1).sum(1)
        return torch.cat([classifier(walk.purified + zero), z[:, None]], dim=1)

    return replace(view, name="guided", logits=logits, read=lambda out, _: out[:, :-1].argmax(1))


@spec
class PublishedATLD(Attack):
    """The "adaptive" attacks of ATLD's Table V: gradients of the classifier and the critic, never of the two behind
    one another, so all of them are weaker than plain PGD on the view "adaptive". For comparison only.

    (Cla+D)-step20 as it stands; Cla-step20 + D-step1 with joint=False, critic_steps=1; D-step1 with class_steps=0,
    critic_steps=1, critic_relative_step=1; D-step20 with class_steps=0, critic_steps=20. objective "margin" is the
    table's CW, and class_steps=1, relative_step=1 its FGSM. Which way the critic is followed is not published: with
    towards="both", first towards "clean", then, where that failed, towards "adversarial"; what is left is at most
    the lower of the two accuracies.
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"gradient", "critic"})
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    published: ClassVar[bool] = True

    class_steps: Natural = 20
    joint: Flag = True
    """Class steps climb the sum of both losses."""
    critic_steps: Natural = 0
    """Steps on the critic's loss alone, after those."""
    relative_step: Positive = 0.25
    critic_relative_step: Positive = 0.25
    weight: NonNegative = 1.0
    """Of the critic's cross-entropy in the sum."""
    towards: Literal["clean", "adversarial", "both"] = "both"
    objective: Literal["ce", "margin"] = "ce"
    kappa: NonNegative = 50.0
    """Where the margin stops paying."""
    random_start: Flag = True

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        start = threat.random_start(x, generator(seed, "start")) if self.random_start else x
        shared = threat.project(start, x)
        if not self.joint:
            shared = self._climb(view, shared, x, goal, threat, 0.0)
            self._pay(cost, slice(None), self.class_steps)
        found, rows = shared, torch.arange(len(x), device=x.device)
        signs = {"clean": (-1.0,), "adversarial": (1.0,), "both": (-1.0, 1.0)}[self.towards]
        for sign in signs:
            if sign != signs[0]:
                cost.queries[rows.cpu()] += 1
                rows = rows[~goal[rows].reached(view.decide(found[rows]))]
            if not len(rows):
                break
            at, where = shared[rows], (x[rows], goal[rows], threat)
            if self.joint:
                at = self._climb(view, at, *where, sign * self.weight)
            found = found.clone()
            found[rows] = self._follow_critic(view, at, x[rows], threat, sign)
            self._pay(cost, rows.cpu(), self.class_steps * self.joint + self.critic_steps)
        return found

    def _climb(self, view: View, at: Tensor, x: Tensor, goal: Goal, threat: ThreatModel, weight: float) -> Tensor:
        """`class_steps` up the class loss + `weight` x the critic's cross-entropy to "clean"."""
        imt, classifier = imt_of(view), static_face(view).logits
        base = capped_margin(self.kappa) if self.objective == "margin" else objective("ce")

        def loss(at: Tensor) -> Tensor:
            if not weight:
                return base(classifier(at), goal)
            z, logits = imt.readout(at)
            return base(logits, goal) + weight * F.softplus(-z)

        return ascend(loss, x, at, threat, steps=self.class_steps, step_size=self.relative_step * threat.radius)

    def _follow_critic(self, view: View, at: Tensor, x: Tensor, threat: ThreatModel, sign: float) -> Tensor:
        """`critic_steps` up (`sign` 1, towards "adversarial") or down its cross-entropy to "clean"."""
        imt, size = imt_of(view), self.critic_relative_step * threat.radius
        return ascend(
            lambda at: sign * F.softplus(-imt.readout(at)[0]), x, at, threat, steps=self.critic_steps, step_size=size
        )

    def _pay(self, cost: Cost, rows: Tensor | slice, steps: int) -> None:
        cost.forwards[rows] += steps
        cost.backwards[rows] += steps

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        signs = 2 if self.towards == "both" else 1
        steps = self.class_steps * (signs if self.joint else 1) + self.critic_steps * signs
        return n * steps, n * steps, n * (signs - 1)
