"""The second engine: an objective per image, minimised over a parametrisation, each image on its own.

The first engine (`engine.py`) climbs inside a ball by projected steps. Here every image has variables of its own (a
tanh box, pixels, a flow field, the parameters of a distribution), which an optimizer with one state per image brings
downhill; a judge scores every iterate, and the best is kept: C&W-l2, stAdv, EXP, SPSA.

    task = Task(TanhBox(), Adam(0.01), objective, judge, steps=1000, finished=converged)
    found = minimise(task, view, x, goal, cost, own={"c": c})
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from casemate.attacks.base import Cost
from casemate.attacks.engine import COMPACT_ABOVE
from casemate.attacks.optimizers import Optimizer, State
from casemate.objectives import margin
from casemate.system import View
from casemate.threat import Goal, ThreatModel


@dataclass
class Live:
    """The images still searched (L of them), and every tensor that follows them when others leave."""

    rows: Tensor
    """(L,) long: positions in the chunk."""
    x: Tensor
    """L x C x H x W, clean."""
    goal: Goal
    variables: Tensor
    """L x ...; while the objective is worked out, the leaf whose gradient is taken."""
    own: dict[str, Tensor]
    """Further tensors of one row per image: the caller's, who may also replace them as the search goes on."""
    kept: Tensor
    """L x C x H x W: the iterate of the lowest score; the clean image before there is one."""
    kept_variables: Tensor
    score: Tensor
    """(L,) lowest score so far; infinite before an iterate was acceptable."""
    done: Tensor
    """(L,) bool: finished, and still in the batch only because leaving it is not worth the copy."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Live:
        return Live(
            self.rows[index], self.x[index], self.goal[index], self.variables[index],
            {name: value[index] for name, value in self.own.items()},
            self.kept[index], self.kept_variables[index], self.score[index], self.done[index],
        )  # fmt: skip

    def judge(self, score: Tensor, x_adv: Tensor) -> None:
        """Keep the iterate where its score is the lowest so far; of several draws, (draws, L), the best one."""
        if score.dim() == 2:
            score, draw = score.min(0)
            x_adv = x_adv.reshape(-1, *self.x.shape)[draw, torch.arange(len(self), device=draw.device)]
        better = (score < self.score) & ~self.done
        self.score = torch.where(better, score, self.score)
        self.kept = torch.where(_over(better, x_adv), x_adv, self.kept)
        self.kept_variables = torch.where(_over(better, self.variables), self.variables, self.kept_variables)


class Parametrisation(ABC):
    """How variables become images. Any noise must be drawn for the whole chunk and taken at `live.rows`."""

    draws: int = 1
    """Images that one image's variables give at each step; their passes are counted."""

    @abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """Variables (N x ...) for clean images (N x C x H x W)."""

    @abstractmethod
    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        """Images ((draws * L) x C x H x W; all images of draw 0 first) in [0, 1], differentiable in the variables."""

    def project(self, variables: Tensor, live: Live) -> Tensor:
        """Variables brought back to where they may be, after every step; unbounded unless overridden."""
        return variables


class TanhBox(Parametrisation):
    """x_adv = (tanh v + 1) / 2: inside the box without a projection (Carlini & Wagner 2017, section V-B)."""

    SHRINK = 0.999999  # artanh of -1 and 1, black and white, is infinite

    def start(self, x: Tensor) -> Tensor:
        return torch.atanh((2 * x - 1) * self.SHRINK)

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        return (variables.tanh() + 1) / 2


@dataclass
class Pixels(Parametrisation):
    """The adversarial image itself, projected on the ball of `threat` around the clean one and on the box."""

    threat: ThreatModel
    first: Tensor | None = None
    """Where the search starts (N x C x H x W); the clean images if None."""

    def start(self, x: Tensor) -> Tensor:
        return x if self.first is None else self.threat.project(self.first, x)

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        return variables

    def project(self, variables: Tensor, live: Live) -> Tensor:
        return self.threat.project(variables, live.x)


Value = Callable[[Tensor, Tensor, Live], Tensor]
"""(logits, x_adv, live) -> (L,) what is minimised; with draws both first arguments have draws * L rows."""
Judge = Callable[[Tensor, Tensor, Tensor, Live], Tensor]
"""(logits, x_adv, values, live), no gradients -> scores, (L,) or (draws, L): lower is better, infinite never kept."""
Finished = Callable[[Live, Tensor, int], Tensor | None]
"""(live, values, step) -> (L,) bool, which images need no further step; None where that is not asked at this step."""
Estimate = Callable[[Live, int], Tensor]
"""(live, step) -> the gradient (L x ...) from values alone; whoever provides it counts its queries."""


def never(live: Live, values: Tensor, step: int) -> Tensor | None:
    """All steps for every image."""
    return None


def at_success(live: Live, values: Tensor, step: int) -> Tensor | None:
    """An image is finished once an iterate of it was acceptable to the judge."""
    return live.score < torch.inf


def unjudged(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
    """Nothing is kept: what counts are the last variables."""
    return torch.full_like(live.score, torch.inf)


def by_margin(view: View) -> Judge:
    """Minus the margin: a success scores at most 0. On an exact view only successes are acceptable, and the first is
    as good as any; on any other, where success cannot be seen, every iterate is."""

    def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
        score = -margin(logits, live.goal)
        if not view.exact:
            return score
        return score.masked_fill(~live.goal.reached(view.labels(logits, x_adv)), torch.inf)

    return judge


@dataclass(frozen=True)
class Task:
    """A minimisation: `steps` evaluations, each followed by an update. What the last update gives is not evaluated,
    unless `judge_last` spends one query on it."""

    parametrisation: Parametrisation
    optimizer: Optimizer
    objective: Value
    judge: Judge
    steps: int
    finished: Finished = never
    estimate: Estimate | None = None
    """In the place of the gradient; an evaluation is then one query."""
    judge_last: bool = False


@dataclass(frozen=True)
class Found:
    """What a search found, in the order of the chunk."""

    x_adv: Tensor
    """N x C x H x W: the iterate of the lowest score, the clean image where none was acceptable."""
    score: Tensor
    """(N,), infinite where no iterate was acceptable."""
    variables: Tensor
    """N x ...: those of `x_adv`; where none was acceptable, the start."""
    last: Tensor
    """N x ...: where the search ended, one step beyond what was evaluated unless the image was finished."""


def minimise(
    task: Task, view: View, x: Tensor, goal: Goal, cost: Cost, own: Mapping[str, Tensor] | None = None,
    among: Tensor | None = None,
) -> Found:  # fmt: skip
    """Minimise `task.objective` for each image of `x` (N x C x H x W in [0, 1]).

    An image that is finished is changed no more, and leaves the batch once more than a tenth of it is finished: what
    is found never depends on the other images, only the cost does. `own` are tensors of N rows that the hooks read
    as `live.own[name]`. `among` (N,) bool says which images are searched at all, for rounds and restarts. Adds
    `draws` passes of the view per evaluation to `cost`; queries, where there is no gradient.
    """
    return _Run(task, view, x, goal, cost).run(dict(own or {}), among)


@dataclass
class _Run:
    task: Task
    view: View
    x: Tensor
    goal: Goal
    cost: Cost
    unpaid: list[int] = field(default_factory=lambda: [0, 0])
    """Forwards and backwards since the batch last changed."""

    def run(self, own: dict[str, Tensor], among: Tensor | None) -> Found:
        n, device, variables = len(self.x), self.x.device, self.task.parametrisation.start(self.x)
        live = Live(
            rows=torch.arange(n, device=device), x=self.x, goal=self.goal, variables=variables, own=own, kept=self.x,
            kept_variables=variables, score=self.x.new_full((n,), torch.inf),
            done=torch.zeros(n, dtype=torch.bool, device=device),
        )  # fmt: skip
        self.found = Found(self.x.clone(), live.score.clone(), variables.clone(), variables.clone())
        live = live if among is None else live[among]
        if len(live):
            live = self._descend(live)
            self._write(live)
            if self.task.judge_last:
                self._judge_last(live[~live.done])
        return self.found

    def _descend(self, live: Live) -> Live:
        """All steps; returns the images that are still in the batch, not written yet."""
        state, down = self.task.optimizer.begin(live.variables), 0
        for step in range(self.task.steps):
            values, total = self._evaluate(live, step, slope=self.task.estimate is None)
            finished = self.task.finished(live, values, step)
            if finished is not None:
                live.done = live.done | finished
                down = int(live.done.sum())
            if down == len(live):
                break
            gradient = None if total is None else self._gradient(total, live.variables)
            live.variables = live.variables.detach()
            if down > (COMPACT_ABOVE * len(live) if total is not None else 0):  # an estimate is dear
                left = ~live.done
                self._write(live)
                live, state, values, down = live[left], state[left], values[left], 0
                gradient = None if gradient is None else gradient[left]
            if gradient is None:
                assert self.task.estimate is not None
                gradient = self.task.estimate(live, step)
            live.variables = self._step(live, state, values, gradient, frozen=down > 0)
        live.variables = live.variables.detach()
        return live

    def _judge_last(self, live: Live) -> None:
        if len(live):
            self._evaluate(live, self.task.steps, slope=False)
            self.cost.queries[live.rows.cpu()] += self.task.parametrisation.draws
            self.unpaid = [0, 0]
            self._write(live)

    def _evaluate(self, live: Live, step: int, slope: bool) -> tuple[Tensor, Tensor | None]:
        """Values (L,) of the iterate, which is judged here, and with `slope` their sum, with its graph."""
        task = self.task
        with torch.set_grad_enabled(slope):
            if slope:
                live.variables = live.variables.detach().requires_grad_()
            x_adv = task.parametrisation.image(live.variables, live, step)
            logits = self.view.logits(x_adv)
            graph = task.objective(logits, x_adv, live)
            total = graph.sum()
        self.unpaid[0] += task.parametrisation.draws
        values, x_adv = graph.detach(), x_adv.detach()
        with torch.no_grad():
            live.judge(task.judge(logits.detach(), x_adv, values, live), x_adv)
        return values, total if slope else None

    def _gradient(self, total: Tensor, leaf: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(total, leaf)
        self.unpaid[1] += self.task.parametrisation.draws
        return gradient

    def _step(self, live: Live, state: State, values: Tensor, gradient: Tensor, frozen: bool) -> Tensor:
        moved = self.task.parametrisation.project(state.step(live.variables, values, gradient), live)
        return torch.where(_over(live.done, moved), live.variables, moved) if frozen else moved

    def _write(self, live: Live) -> None:
        """Put down what is known of the batch, and what it has cost since it last changed."""
        rows, (forwards, backwards) = live.rows.cpu(), self.unpaid
        if self.task.estimate is None:
            self.cost.forwards[rows] += forwards * self.view.passes[0]
            self.cost.backwards[rows] += backwards * self.view.passes[1]
        else:
            self.cost.queries[rows] += forwards
        self.unpaid = [0, 0]
        self.found.x_adv[live.rows], self.found.score[live.rows] = live.kept, live.score
        self.found.variables[live.rows], self.found.last[live.rows] = live.kept_variables, live.variables


def _over(mask: Tensor, like: Tensor) -> Tensor:
    """(L,) shaped to broadcast over `like` (L x ...)."""
    return mask.view(-1, *[1] * (like.dim() - 1))
