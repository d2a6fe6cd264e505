"""EXP: the adversarial distribution of each image, searched by gradient (Dong et al. 2020, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from casemate.attacks import optimizers
from casemate.attacks.base import Attack, Cost
from casemate.attacks.chunk import Chunk
from casemate.attacks.distributions import TanhGaussian
from casemate.attacks.learned import conclude, concluding_queries
from casemate.attacks.minimise import Found, Live, Parametrisation, Task, at_success, minimise, never
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, spec
from casemate.objectives import Objective, objective
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, Norm, ThreatModel


@spec
class EXP(Attack):
    """Maximises, for each image, E[objective(x + delta)] + `entropy` x H(delta) over the means and widths of a
    tanh-Gaussian, by Adam with betas (0, 0) on `samples` draws in each of `steps` steps.

    With `keep` "best", the first draw that succeeds is kept and ends the search. The authors' protocol is `keep`
    "last": all steps, then `draws` 1 fresh sample of the final distribution; more draws keep the worst of them.

    Where a model is so sure of itself that the slope of its CE is below that of the entropy, the search follows the
    entropy and the image stands: `objective` "margin" (or less `entropy`) is stronger there.
    """

    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})

    steps: Count = 20
    samples: Count = 10
    """Draws per step; forwards and input gradients are steps x samples."""
    lr: Positive = 0.3
    entropy: NonNegative = 0.01
    """Weight of the entropy."""
    entropy_over: Literal["mean", "sum"] = "mean"
    """Per pixel as in the authors' code, or of the whole image as in the paper, where this weight rules the loss."""
    accumulate: Flag = False
    """Steps follow the sum of all gradients so far, as in the authors' code, which never clears them."""
    objective: Literal["ce", "margin"] = "ce"
    draws: Count = 1
    """Samples of the final distribution."""
    final: Literal["sample", "mean"] = "sample"
    """What is taken of the final distribution: samples, or its centre (then `draws` is 1)."""
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if self.final == "mean" and self.draws > 1:
            raise UserError("EXP: a distribution has one centre: final 'mean' needs draws 1")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        found = self.fit(view, x, goal, threat, seed, cost)
        chunk = Chunk(view, x, goal, threat, seed, cost, score=objective(self.objective))
        chunk.out, chunk.value = found.x_adv, -found.score
        if view.exact:
            chunk.standing = found.score == torch.inf
        last = distribution(found.last, threat)
        for draw in range(self.draws):
            rows = chunk.rows()
            if not len(rows):
                break
            noise = torch.zeros_like(x)
            if self.final == "sample":
                noise = torch.randn(x.shape, generator=chunk.noise("final", draw)).to(x)
            x_adv = last.perturb(x, noise)[rows]
            conclude(chunk, rows, x_adv, last=draw == self.draws - 1, rivals=self._rivals)
        return chunk.out

    def fit(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Found:
        """The search alone: `distribution(found.last, threat)` is what it ends with. `found.score` is minus the
        objective of the kept draw, infinite where none was kept."""
        adam: optimizers.Optimizer = optimizers.Adam(self.lr, betas=(0.0, 0.0))
        density = _Density(threat, seed, self.samples, self.entropy_over)
        climbed = objective(self.objective)

        def value(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
            return -self._each(climbed, logits, live).mean(0) - self.entropy * density.entropy

        def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
            score = -self._each(climbed, logits, live)
            if not best:
                return torch.full_like(score, torch.inf)
            if not view.exact:
                return score
            hit = self._repeated(live.goal).reached(view.labels(logits, x_adv)).view_as(score)
            return score.masked_fill(~hit, torch.inf)

        best = self.keep == "best"
        task = Task(
            density, Accumulated(adam) if self.accumulate else adam, value, judge, self.steps,
            at_success if best and view.exact else never,
        )  # fmt: skip
        return minimise(task, view, x, goal, cost)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.steps * self.samples
        queries = concluding_queries(view, self.draws, self._rivals)
        return looks * view.passes[0], looks * view.passes[1], n * queries

    @property
    def _rivals(self) -> bool:
        return self.keep == "best" or self.draws > 1

    def _each(self, climbed: Objective, logits: Tensor, live: Live) -> Tensor:
        """samples x L objectives."""
        return climbed(logits, self._repeated(live.goal)).view(self.samples, len(live))

    def _repeated(self, goal: Goal) -> Goal:
        targets = None if goal.targets is None else goal.targets.repeat(self.samples)
        return Goal(goal.labels.repeat(self.samples), targets)


def distribution(variables: Tensor, threat: ThreatModel) -> TanhGaussian:
    """The distribution that variables N x 2 x C x H x W (means, then widths before the softplus) stand for."""
    return TanhGaussian(variables[:, 0], variables[:, 1], threat.radius)


class _Density(Parametrisation):
    """Variables N x 2 x C x H x W that begin at 0: no shift, and sigma = ln 2. `entropy` (L,) is that of the last
    draws."""

    entropy: Tensor

    def __init__(self, threat: ThreatModel, seed: int, samples: int, over: Literal["mean", "sum"]) -> None:
        self.threat, self.seed, self.draws, self.over, self.n = threat, seed, samples, over, 0

    def start(self, x: Tensor) -> Tensor:
        self.n = len(x)
        return torch.zeros_like(x)[:, None].repeat(1, 2, 1, 1, 1)

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        rng = generator(self.seed, "sample", step)
        noise = torch.randn(self.draws, self.n, *live.x.shape[1:], generator=rng).to(live.x)[:, live.rows]
        here = distribution(variables, self.threat)
        surprisal = here.surprisal(noise).flatten(2)
        self.entropy = (surprisal.mean(2) if self.over == "mean" else surprisal.sum(2)).mean(0)
        return here.perturb(live.x, noise).flatten(0, 1)


@dataclass(frozen=True)
class Accumulated(optimizers.Optimizer):
    """`inner` on the sum of all gradients so far."""

    inner: optimizers.Optimizer

    def begin(self, variables: Tensor) -> optimizers.State:
        return _Accumulated(self.inner.begin(variables), torch.zeros_like(variables))


@dataclass
class _Accumulated(optimizers.State):
    inner: optimizers.State
    total: Tensor

    def step(self, variables: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        self.total = self.total + gradient
        return self.inner.step(variables, values, self.total)

    def __getitem__(self, index: Tensor) -> optimizers.State:
        return _Accumulated(self.inner[index], self.total[index])
