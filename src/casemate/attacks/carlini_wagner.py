"""The attacks of Carlini & Wagner (2017) that are minimisations: the smallest l2 distance, and an Adam form in linf.

The "CW" of the linf tables is neither: that is projected ascent on the margin, `gradient.CWMargin`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.attacks.diagnostics import AttackWarning
from casemate.attacks.minimise import (
    Finished,
    Judge,
    Live,
    Pixels,
    TanhBox,
    Task,
    Value,
    at_success,
    by_margin,
    minimise,
    unjudged,
)
from casemate.attacks.optimizers import Adam
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, spec
from casemate.objectives import margin
from casemate.system import View
from casemate.threat import Goal, Norm, ThreatModel

ROUNDING = 1e-6
"""A success must be clear by this share of the largest logit, or another batch size could undo it."""
LOWEST, HIGHEST = 0.0, 1e10
KNOWN = 1e9
"""An upper bound below this one was met; above it the weight is still multiplied by ten."""
CHECKS = 10
"""Looks at whether an image has settled, per round."""
STILL = 0.9999
FAREST = 7.25
"""atanh(0.999999): steps over Adam's rate that a black pixel needs to become grey. Until then nothing has settled."""
SATURATED = 1e-3
"""A pixel this near to black or white starts where the tanh is flat."""
PATIENCE = 100
"""Steps of CWAdam before a round may end for want of progress."""
NEARBY = 1e-5
"""Nobody searches on below this distance per pixel: it is what the tanh box costs an image wrong from the start."""


@spec
class CWL2(Attack):
    """The smallest l2 distance at which the decision is wrong by a margin of `kappa`.

    min ||x' - x||_2^2 + c * max(kappa - margin, 0) over x' = (tanh w + 1) / 2 by Adam, with a binary search for the
    weight c of each image (Carlini & Wagner 2017, section VI-A, and the authors' code). The nearest success of all
    rounds is kept; without one the image comes back as it was. Inside the threat model a result counts as success.

    On a view that is not exact, the face's own logits say what a success is; give it a `kappa` to transfer.
    """

    minimum_norm: ClassVar[bool] = True

    steps: Count = 10000
    """Adam steps of a round, at most."""
    rounds: Count = 9
    """Of the binary search; with ten or more the last one takes the smallest weight that has succeeded."""
    rate: Positive = 0.01
    first_weight: Positive = 0.001
    kappa: NonNegative = 0.0
    abort_early: Flag = True
    """An image leaves a round when, for two tenths of the steps in a row, its lowest objective has not come 0.01 %
    below that of the tenth before, and black pixels have had the time to become grey. (The authors stop a round for
    the whole batch, by the sum of its objectives, so that an image's result depends on the others.)"""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        self._warn_if_short(x)
        judge = self._distance_of_successes(view)
        task = Task(TanhBox(), Adam(self.rate), self._objective, judge, self.steps, self._settled())
        best, kept = x.new_full((len(x),), torch.inf), x.clone()
        weight = Weight.first(best, self.first_weight)
        for turn in range(self.rounds):
            if self.rounds >= 10 and turn == self.rounds - 1:
                weight.value = torch.where(weight.high < KNOWN, weight.high, weight.value)
            high, none = torch.full_like(best, torch.inf), torch.zeros_like(best)
            own = {"weight": weight.value, "before": high, "lowest": high, "still": none}
            found = minimise(task, view, x, goal, cost, own, among=best > _nearby(x))
            better = found.score < best
            best = torch.where(better, found.score, best)
            kept = torch.where(_images(better), found.x_adv, kept)
            weight.search(found.score < torch.inf)
        return kept

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.steps * self.rounds
        return looks * view.passes[0], looks * view.passes[1], 0

    def _warn_if_short(self, x: Tensor) -> None:
        """Where most pixels are black or white and cannot become grey in a round, next to nothing can be changed."""
        needed = math.ceil(FAREST / self.rate)
        stuck = float(((x < SATURATED) | (x > 1 - SATURATED)).float().mean())
        if self.steps < needed and stuck > 0.5:
            line = (
                f"C&W's {self.steps} steps at rate {self.rate:g} move no black or white pixel ({stuck:.0%} of them "
                f"are); {needed} steps, or rate {FAREST / self.steps:.2g}, do"
            )
            warnings.warn(line, AttackWarning, stacklevel=3)

    def _objective(self, logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        distance = (x_adv - live.x).flatten(1).square().sum(1)
        return distance + live.own["weight"] * _hinge(logits, live.goal, self.kappa)

    def _distance_of_successes(self, view: View) -> Judge:
        def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
            clear = self.kappa + ROUNDING * logits.abs().amax(1)
            hit = live.goal.reached(view.labels(logits, x_adv)) & (margin(logits, live.goal) >= clear)
            return (x_adv - live.x).flatten(1).square().sum(1).masked_fill(~hit, torch.inf)

        return judge

    def _settled(self) -> Finished:
        every = max(1, self.steps // CHECKS)

        def settled(live: Live, values: Tensor, step: int) -> Tensor | None:
            own = live.own
            if self.abort_early:
                own["lowest"] = torch.minimum(own["lowest"], values)
            if step % every:
                return None
            done = live.score <= _nearby(live.x)
            if self.abort_early:
                falling = own["lowest"] <= STILL * own["before"]
                own["still"] = torch.where(falling, 0, own["still"] + 1)
                own["before"], own["lowest"] = own["lowest"], torch.full_like(values, torch.inf)
                done = done | ((own["still"] >= 2) & (step >= FAREST / self.rate))
            return done

        return settled


@dataclass
class Weight:
    """A binary search for the weight of each image: (N,) lower bound, upper bound, and the value of this round."""

    low: Tensor
    high: Tensor
    value: Tensor

    @classmethod
    def first(cls, like: Tensor, value: float, high: float = HIGHEST) -> Weight:
        return cls(torch.full_like(like, LOWEST), torch.full_like(like, high), torch.full_like(like, value))

    def search(self, hit: Tensor) -> None:
        """The next value: half way between the bounds, or ten times more while no success has set an upper one."""
        self.high = torch.where(hit, torch.minimum(self.high, self.value), self.high)
        self.low = torch.where(hit, self.low, torch.maximum(self.low, self.value))
        self.value = torch.where(self.high < KNOWN, (self.low + self.high) / 2, 10 * self.value)


@spec
class CWAdam(Attack):
    """The "C&W" of L2L-DA's linf tables (Jang et al. 2019, by mister_ed): Adam on the perturbation, kept in the ball.

    min max(||x' - x||_inf - tau, 0) + weight * max(kappa - margin, 0), the weight raised by a binary search over
    `rounds`, each of which begins anew. As its authors run it it is no evidence of robustness: it left 63 % of an
    undefended MNIST network standing. Their table needs `weighted: false`, `keep: last`, `progress: 1e-5`, and a
    `tau` of 8/255 on every dataset; without these the same search is done soundly.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})

    steps: Count = 100
    rounds: Count = 10
    rate: Positive = 0.001
    """Pixel units per step, about."""
    first_weight: Positive = 1.0
    highest_weight: Positive = 128.0
    kappa: NonNegative = 0.0
    tau: NonNegative | None = None
    """The distance (pixel units) beyond which the penalty begins; the radius if none is given."""
    weighted: Flag = True
    """Whether the searched weight enters the loss. Without it every round repeats the first, so one is run."""
    keep: Literal["best", "last"] = "best"
    """The first success of any round; or the last iterate of the last round."""
    progress: NonNegative = 0.0
    """A round ends for an image, after 100 steps, when one step lowers its loss by less than this share; 0 never."""

    def __post_init__(self) -> None:
        if self.first_weight > self.highest_weight:
            raise UserError("CWAdam: first_weight must not be above highest_weight")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        first = self.keep == "best"
        judge = by_margin(view) if first else unjudged
        task = Task(
            Pixels(threat), Adam(self.rate), self._objective(threat), judge, self.steps,
            self._ends(first and view.exact), judge_last=first,
        )  # fmt: skip
        out, best = x, x.new_full((len(x),), torch.inf)
        standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
        weight = Weight.first(best, self.first_weight, self.highest_weight)
        for turn in range(self._turns):
            own = {"weight": weight.value, "before": torch.full_like(best, torch.inf)}
            found = minimise(task, view, x, goal, cost, own, among=standing)
            if first:
                score, ended = found.score, torch.where(_images(found.score < torch.inf), found.x_adv, found.last)
                out = torch.where(_images((score < best) | (standing & best.isinf())), ended, out)
            else:
                out = found.last
                score = best if turn == self._turns - 1 else self._look(view, out, goal, cost)
            best = torch.minimum(best, score)
            weight.search(score <= 0)
            if first and view.exact:
                standing = standing & (score > 0)
        return out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks, queries = n * self.steps * self._turns, n * (self._turns - (self.keep == "last"))
        return looks * view.passes[0], looks * view.passes[1], queries

    @property
    def _turns(self) -> int:
        return self.rounds if self.weighted else 1

    def _objective(self, threat: ThreatModel) -> Value:
        tau = threat.radius if self.tau is None else self.tau

        def objective(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
            beyond = ((x_adv - live.x).abs().flatten(1).amax(1) - tau).clamp(min=0)
            weight = live.own["weight"] if self.weighted else self.first_weight
            return beyond + weight * _hinge(logits, live.goal, self.kappa)

        return objective

    def _ends(self, first_success: bool) -> Finished:
        def ends(live: Live, values: Tensor, step: int) -> Tensor | None:
            done = at_success(live, values, step) if first_success else None
            if self.progress:
                still = values + 1e-10 > (1 - self.progress) * live.own["before"]
                live.own["before"] = values
                if step >= PATIENCE:
                    done = still if done is None else done | still
            return done

        return ends

    def _look(self, view: View, x_adv: Tensor, goal: Goal, cost: Cost) -> Tensor:
        """Minus the margin at the end of a round; one query."""
        cost.queries += 1
        with torch.no_grad():
            return -margin(view.logits(x_adv), goal)


def _hinge(logits: Tensor, goal: Goal, kappa: float) -> Tensor:
    """max(kappa - margin, 0): f6 of Carlini & Wagner (2017)."""
    return (kappa - margin(logits, goal)).clamp(min=0)


def _nearby(x: Tensor) -> float:
    return x[0].numel() * NEARBY**2


def _images(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)
