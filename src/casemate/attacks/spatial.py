"""Attacks that move pixels instead of changing them: stAdv and ADef. Their budget is a flow, not an lp ball."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.attacks.base import Attack, Cost, Shown
from casemate.attacks.minimise import Finished, Live, Parametrisation, Task, at_success, minimise, never
from casemate.attacks.optimizers import LBFGS, Adam
from casemate.attacks.warping import FlowBudget, displacement, limited, warp
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.objectives import margin
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, ThreatModel

CORRECTIONS = 20
"""Pairs that L-BFGS remembers, as in the authors' setting."""
FLAT = 1e-12
"""Squared slope of the score along all flows, below which no deformation helps."""


def roughness(flow: Tensor, neighbours: str = "axis") -> Tensor:
    """(N,) L_flow (Xiao et al. 2018, eq. 4): the sum over pixels p and their four neighbours q of
    sqrt(|flow_p - flow_q|^2 + 1e-8). Beyond the edge a pixel is its own neighbour."""
    height, width = flow.shape[-2:]
    padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    places = ((0, 1), (2, 1), (1, 0), (1, 2)) if neighbours == "axis" else ((0, 0), (0, 2), (2, 0), (2, 2))
    total = flow.new_zeros(len(flow))
    for row, column in places:
        apart = flow - padded[..., row : row + height, column : column + width]
        total = total + (apart.square().sum(1) + 1e-8).sqrt().flatten(1).sum(1)
    return total


@dataclass
class _Flow(Parametrisation):
    """A flow for each image, no vector longer than `limit`."""

    first: Tensor
    limit: float | None

    def start(self, x: Tensor) -> Tensor:
        return self.first if self.limit is None else limited(self.first, self.limit)

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        return warp(live.x, variables)

    def project(self, variables: Tensor, live: Live) -> Tensor:
        return variables if self.limit is None else limited(variables, self.limit)


@spec
class StAdv(Attack):
    """stAdv (Xiao et al. 2018): minimise max(-margin, -kappa) + tau * roughness over a flow in pixels.

    By L-BFGS, as its authors, or by Adam; each image on its own either way. Of the flows that succeed the smoothest
    is kept; where none does, the last. Its budget is the flow: it counts in an lp worst case only where its image
    happens to lie in the ball.
    """

    optimizer: Literal["adam", "lbfgs"] = "adam"
    steps: Count = 500
    """Evaluations, one forward and one gradient each; those of L-BFGS's line search count."""
    tau: NonNegative = 0.05
    """Weight of the roughness: larger is smoother, and weaker."""
    kappa: NonNegative = 0.1
    """Margin at which it is content; 0 in the paper, where rounding can undo a success."""
    rate: Positive = 0.005
    """Adam's learning rate in pixels; 0.01 suits images of 224 pixels."""
    max_displacement: Positive | None = None
    """Longest way of a pixel, in pixels. None leaves it to `tau`."""
    neighbours: Literal["axis", "diagonal"] = "axis"
    """Whose flows are compared: the four beside a pixel, or the four diagonal ones of the reference code."""
    restarts: Count = 2
    """Runs on the images that still stand; 1 in the paper."""
    start: Positive = 1.0
    """The first run starts from no flow, where the roughness has a kink that a small slope cannot leave; any other
    from one that is uniform in -start to start pixels."""
    keep: Literal["smoothest", "first"] = "smoothest"
    """`first` stops an image at its first success, which costs less and moves more."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        n, _, height, width = x.shape
        out, flow = x.clone(), x.new_zeros(n, 2, height, width)
        best, rows = x.new_full((n,), torch.inf), torch.arange(n, device=x.device)
        for restart in range(self.restarts):
            first = torch.rand(flow.shape, generator=generator(seed, "flow", restart)).to(x) * 2 - 1
            task = self._task(view, first[rows] * (self.start if restart else 0))
            spent = Cost.zero(len(rows))
            found = minimise(task, view, x[rows], goal[rows], spent, own={"rough": x.new_zeros(len(rows))})
            _add(cost, spent, rows.cpu())
            known = found.score.isfinite()
            moved = found.variables.where(_over(known), found.last)
            x_adv = torch.where(_over(known), found.x_adv, warp(x[rows], moved))  # the last is not yet judged
            better = found.score <= best[rows]
            at = rows[better]
            best[at], out[at], flow[at] = found.score[better], x_adv[better], moved[better]
            rows = rows[~known] if view.exact else rows
            if not len(rows):
                break
        return Shown(out, flow)

    def _task(self, view: View, first: Tensor) -> Task:
        """One minimisation from the flows `first`. A judge's score is the roughness of a success, or minus the
        margin on a view that cannot tell success."""
        smooth = roughness(torch.zeros_like(first[:1]), self.neighbours)

        def loss(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
            rough = roughness(live.variables, self.neighbours)
            live.own["rough"] = rough.detach()
            return self.tau * rough - margin(logits, live.goal).clamp(max=self.kappa)

        def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
            if not view.exact:
                return -margin(logits, live.goal)
            return live.own["rough"].where(live.goal.reached(view.labels(logits, x_adv)), torch.inf)

        def smoothest(live: Live, values: Tensor, step: int) -> Tensor:
            return live.score <= smooth * (1 + 1e-5)  # wrong without moving: nothing is smoother

        finished: Finished = never if not view.exact else at_success if self.keep == "first" else smoothest
        optimizer = Adam(self.rate) if self.optimizer == "adam" else LBFGS(memory=CORRECTIONS)
        return Task(_Flow(first, self.max_displacement), optimizer, loss, judge, self.steps, finished)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        steps = n * self.steps * self.restarts
        return steps * view.passes[0], steps * view.passes[1], 0

    def budget(self, threat: ThreatModel) -> FlowBudget:
        return FlowBudget(f"flow tau {self.tau:g}", self.max_displacement)


@spec
class ADef(Attack):
    """ADef (Alaifari et al. 2019, Algorithm 1): the least deformation that crosses the nearest boundary, to first
    order, over and over.

    Each step takes, of the `candidates` classes, the one whose flow makes the sum of all steps the smallest. Stops
    where the view is fooled. The overshoot multiplies the sum of the steps, as in DeepFool. The smoothed flow is
    the least one in the norm that the Gaussian induces; it vanishes outside the image.
    """

    steps: Count = 100
    candidates: Count = 9
    """Classes tried, those of the highest scores; each costs a gradient per step. With a target, that one."""
    sigma: NonNegative = 1.0
    """Width of the Gaussian in pixels, the attack's smoothness; 0.5 suits 32 pixels, 0 is none."""
    overshoot: Positive = 1.2
    max_displacement: Positive | None = None
    """Longest way of a pixel, in pixels."""
    smallest: Literal["max", "l2"] = "max"
    """How the size of a flow is measured: its longest vector, or its l2 norm."""

    def __post_init__(self) -> None:
        if self.overshoot < 1:
            raise UserError(f"ADef: overshoot must be at least 1, and is {self.overshoot:g}")

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Shown:
        return _Deformation(self, view, x, goal, cost).run()

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        steps = n * self.steps
        return steps * view.passes[0], steps * self.candidates * view.passes[1], 0 if view.exact else n

    def budget(self, threat: ThreatModel) -> FlowBudget:
        return FlowBudget("deformation", self.max_displacement)


@dataclass
class _Deformation:
    """One ADef run of a chunk: `flow` holds the deformations applied, overshoot included."""

    attack: ADef
    view: View
    x: Tensor
    goal: Goal
    cost: Cost

    def run(self) -> Shown:
        n, _, height, width = self.x.shape
        self.limit = self.attack.max_displacement or math.hypot(height, width)  # further off lies only the edge
        self.flow = self.x.new_zeros(n, 2, height, width)
        self.best, self.best_flow = self.x.new_full((n,), -torch.inf), self.flow.clone()
        rows = torch.arange(n, device=self.x.device)
        classes: Tensor | None = None
        for _ in range(self.attack.steps):
            x, goal = self.x[rows], self.goal[rows]
            with torch.enable_grad():
                leaf = warp(x, self.flow[rows]).requires_grad_()
                logits = self.view.logits(leaf)
                if classes is None:
                    classes = self._candidates(logits.detach())
                scores = _scores(logits, goal, classes)
            self._pay(rows, forwards=1)
            self._judge(rows, logits.detach())
            fooled = goal.reached(self.view.labels(logits.detach(), leaf.detach()))
            if bool(fooled.all()):
                return self._shown()
            moved, sound = self._move(rows, leaf, scores)
            left = sound & ~fooled
            self.flow[rows[left]] = moved[left]
            rows, classes = rows[left], classes[left]
            if not len(rows):
                return self._shown()
        if not self.view.exact:  # the last step has not been looked at
            with torch.no_grad():
                self._judge(rows, self.view.logits(warp(self.x[rows], self.flow[rows])))
            self.cost.queries[rows.cpu()] += 1
        return self._shown()

    def _candidates(self, logits: Tensor) -> Tensor:
        """N x K classes: the target, or the likeliest ones beside the label."""
        if self.goal.targets is not None:
            return self.goal.targets[:, None]
        others = logits.scatter(1, self.goal.labels[:, None], -torch.inf)
        return others.topk(min(self.attack.candidates, logits.shape[1] - 1), dim=1).indices

    def _move(self, rows: Tensor, leaf: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The flow after the best candidate's step, and where there is one (L,)."""
        before, slopes = self.flow[rows], _slopes(leaf.detach())
        least = before.new_full((len(rows),), torch.inf)
        chosen = before
        for k in range(scores.shape[1]):
            more = k + 1 < scores.shape[1]
            (gradient,) = torch.autograd.grad(scores[:, k].sum(), leaf, retain_graph=more)
            alpha = torch.stack([(gradient * slope).sum(1) for slope in slopes], dim=1)
            blurred = blur(alpha, self.attack.sigma)
            length = blurred.square().flatten(1).sum(1)
            share = -scores[:, k].detach() / length.clamp_min(FLAT)
            flow = before + self.attack.overshoot * _over(share) * blur(blurred, self.attack.sigma)
            size = displacement(flow) if self.attack.smallest == "max" else flow.flatten(1).norm(dim=1)
            better = (length > FLAT) & (size < least)
            least, chosen = torch.where(better, size, least), flow.where(_over(better), chosen)
        self._pay(rows, backwards=scores.shape[1])
        return limited(chosen, self.limit), least.isfinite()

    def _judge(self, rows: Tensor, logits: Tensor) -> None:
        value = margin(logits, self.goal[rows])
        better = value > self.best[rows]
        self.best[rows] = torch.where(better, value, self.best[rows])
        self.best_flow[rows] = self.flow[rows].where(_over(better), self.best_flow[rows])

    def _shown(self) -> Shown:
        """On an exact view where each image ended, else where its margin was the highest."""
        flow = self.flow if self.view.exact else self.best_flow
        return Shown(warp(self.x, flow), flow)

    def _pay(self, rows: Tensor, forwards: int = 0, backwards: int = 0) -> None:
        self.cost.forwards[rows.cpu()] += forwards * self.view.passes[0]
        self.cost.backwards[rows.cpu()] += backwards * self.view.passes[1]


def _add(cost: Cost, spent: Cost, rows: Tensor) -> None:
    """Charge what a run on some images has spent."""
    cost.forwards[rows] += spent.forwards
    cost.backwards[rows] += spent.backwards
    cost.queries[rows] += spent.queries


def _over(values: Tensor) -> Tensor:
    """(L,) shaped to broadcast over images and flows."""
    return values.view(-1, 1, 1, 1)


def _scores(logits: Tensor, goal: Goal, classes: Tensor) -> Tensor:
    """L x K: how far each candidate lies above the label, or the target above all others; success is above 0."""
    if goal.targets is not None:
        return margin(logits, goal)[:, None]
    return logits.gather(1, classes) - logits.gather(1, goal.labels[:, None])


def _slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences to the right and down, one-sided at the edges; none along a side of one pixel."""
    right, down = (torch.gradient(x, dim=dim)[0] if x.shape[dim] > 1 else torch.zeros_like(x) for dim in (3, 2))
    return right, down


def blur(flow: Tensor, sigma: float) -> Tensor:
    """Both components under a Gaussian of width `sigma` pixels (cut at 4 sigma, zero outside the image), so that
    <a, blur(b)> = <blur(a), b>, on which the step's length rests."""
    if sigma == 0:
        return flow
    reach = max(1, math.ceil(4 * sigma))
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=flow.device, dtype=flow.dtype) / sigma) ** 2)
    bell = (bell / bell.sum()).expand(2, 1, -1)
    down = F.conv2d(flow, bell[..., None], padding=(reach, 0), groups=2)
    return F.conv2d(down, bell[:, :, None], padding=(0, reach), groups=2)
