"""The latent attack (LA) that comes with latent adversarial training (Sinha et al. 2019, and the authors' code).

Codes of a hidden layer are moved up the loss first; then the image is moved to where it has these codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from casemate.attacks.ascent import l2_step, sign_step
from casemate.attacks.base import Attack, Cost
from casemate.attacks.engine import momentum
from casemate.attacks.minimise import Live, Pixels, Task, at_success, by_margin, minimise, never
from casemate.attacks.optimizers import Optimizer, State
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, Positive, Text, spec
from casemate.networks.base import Classifier
from casemate.objectives import cross_entropy
from casemate.seeding import derive
from casemate.system import View
from casemate.threat import Goal, ThreatModel


@spec
class Latent(Attack):
    """`rounds` times, f = g o h being split after `layer`: z' ascends CE(g(z'), y) from z = h(x') by `latent_steps`
    steps, kept in the range of each channel of z; then x' descends |h(x') - z'|_1 by `steps` momentum steps in the
    ball.

    It begins at the clean image and draws nothing. A round begins where the one before ended; an image falls with the
    first iterate that succeeds (the authors look once a round). What is read at the layer is behind a purification,
    which each step goes through; z' ascends in g alone. A pass of g counts as a whole one. Raises UserError if the
    system shows no layers, or none of that name.
    """

    reads_layers: ClassVar[bool] = True

    rounds: Count = 15
    latent_steps: Count = 10
    steps: Count = 40
    step_size: Positive | None = None
    """Of the image, in pixel units."""
    relative_step: Positive = 0.0625
    """Step size over radius, where no `step_size` is given: 0.5/255 at 8/255."""
    layer: Text | None = None
    """Name of the layer whose output is moved; without it the first one, as published."""
    bounds: Literal["image", "batch"] = "image"
    """What a channel's range (with "l2" also the norm and the radius) is of: each image alone, all channels together
    where codes have no places; or all images that still stand, as published: then no result is an image's own."""
    headroom: NonNegative = 0.1
    """How far z' may go above the range, as a share of its upper end."""
    latent_norm: Literal["linf", "l2"] = "linf"
    """Steps of z' along signs, in the range only; or along the gradient over its norm, in an l2 ball, too."""
    latent_step: Positive | None = None
    """In units of the codes. Without it 0.01 along signs; in l2, for which none is told, 2.5 radii over the steps."""
    latent_radius: Positive = 150.0
    """Of the l2 ball. The published one is that of a whole batch: with bounds "image" it should be smaller."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        size = self.step_size or self.relative_step * threat.radius
        move = MomentumDescent(size, sign_step if threat.norm == "linf" else l2_step)
        ends, judge = (at_success if view.exact else never), by_margin(view)
        out = x_adv = x
        best = x.new_full((len(x),), torch.inf)
        standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
        with opened(view, self.layer) as halves:

            def apart(logits: Tensor, at: Tensor, live: Live) -> Tensor:
                return (halves.codes.float() - live.own["wanted"]).abs().flatten(1).sum(1)

            for number in range(self.rounds):
                rows = standing.nonzero()[:, 0]
                use = derive(seed, "latent", number)
                aim = self._aim(halves, view, x_adv[rows], goal[rows], use)
                spent = rows.cpu()
                cost.queries[spent] += 1
                cost.forwards[spent] += self.latent_steps
                cost.backwards[spent] += self.latent_steps
                wanted = aim.new_zeros((len(x), *aim.shape[1:])).index_copy_(0, rows, aim)

                last = number == self.rounds - 1  # any other end is where the next round begins, and judged there
                task = Task(Pixels(threat, x_adv), move, apart, judge, self.steps, ends, judge_last=last)
                found = minimise(task, view, x, goal, cost, {"wanted": wanted}, among=standing)
                x_adv, hit = found.last, found.score < torch.inf
                ended = torch.where(_images(hit), found.x_adv, found.last)
                out = torch.where(_images((found.score < best) | (standing & best.isinf())), ended, out)
                best = torch.minimum(best, found.score)
                if view.exact:
                    standing = standing & ~hit
                    if not bool(standing.any()):
                        break
        return out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        forwards, backwards = (self.steps * one + self.latent_steps for one in view.passes)
        return n * self.rounds * forwards, n * self.rounds * backwards, n * (self.rounds + 1)

    def _aim(self, halves: Halves, view: View, x_adv: Tensor, goal: Goal, use: int) -> Tensor:
        """The codes (L x ..., float32) to move images to. One query, and `latent_steps` passes of the upper half."""
        with torch.no_grad():
            view.logits(x_adv)
            z = halves.codes.float()
        low, high = self._range(z)
        codes = z
        # An upper half that draws noise does so from torch's global generator: here it is seeded, and then put back.
        with torch.random.fork_rng([z.device] if z.is_cuda else []):
            (torch.cuda if z.is_cuda else torch.default_generator).manual_seed(use)
            for _ in range(self.latent_steps):
                codes = codes.detach().requires_grad_()
                loss = cross_entropy(halves.upper(codes).float(), goal).sum()
                (gradient,) = torch.autograd.grad(loss, codes)
                codes = torch.minimum(torch.maximum(self._moved(codes.detach(), gradient, z), low), high)
        return codes

    def _range(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(least, greatest) value that codes z (L x C x ...) may move to, shaped to broadcast over them."""
        places = tuple(range(2, z.dim()))
        axes = (0, *places) if self.bounds == "batch" else places or (1,)
        low, high = z.amin(axes, keepdim=True), z.amax(axes, keepdim=True)
        return low, high + self.headroom * high.abs()  # 1.1 times a negative maximum would be below it

    def _moved(self, codes: Tensor, gradient: Tensor, z: Tensor) -> Tensor:
        if self.latent_norm == "linf":
            return codes + (self.latent_step or 0.01) * gradient.sign()
        size = self.latent_step or 2.5 * self.latent_radius / self.latent_steps
        rows = len(z) if self.bounds == "image" else 1
        along = l2_step(gradient.reshape(rows, -1)).view_as(z)
        shift = (codes + size * along - z).reshape(rows, -1).renorm(2, 0, self.latent_radius)
        return z + shift.view_as(z)


@dataclass(frozen=True)
class MomentumDescent(Optimizer):
    """v <- v - rate * direction(m), m <- m + g / ||g||_1 for each image; a zero gradient leaves m as it is."""

    rate: float
    direction: Callable[[Tensor], Tensor]

    def begin(self, variables: Tensor) -> State:
        return _Momentum(self, torch.zeros_like(variables))


@dataclass
class _Momentum(State):
    numbers: MomentumDescent
    climbed: Tensor

    def step(self, variables: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        self.climbed = momentum(1.0)(gradient, self.climbed)
        return variables.sub(self.numbers.direction(self.climbed), alpha=self.numbers.rate)

    def __getitem__(self, index: Tensor) -> State:
        return _Momentum(self.numbers, self.climbed[index])


class Halves:
    """A classifier cut after a layer: `codes` is what the layer last put out (L x ...), with its graph; `upper` makes
    logits of such codes."""

    codes: Tensor

    def __init__(self, upper: nn.Module) -> None:
        self.upper = upper

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...], codes: Tensor) -> None:
        self.codes = codes


@contextmanager
def opened(view: View, layer: str | None) -> Iterator[Halves]:
    """While open, the codes behind the view's latest logits. Raises UserError if nobody can look inside."""
    classifier = getattr(view.system, "classifier", None)
    if not isinstance(classifier, Classifier):
        raise UserError(
            "attack Latent needs the layers of the classifier, and this system shows none: only networks of "
            "casemate.networks have them"
        )
    name = layer or classifier.layers[0]
    halves = Halves(classifier.split(name)[1])
    hook = classifier.body[name].register_forward_hook(halves)
    try:
        yield halves
    finally:
        hook.remove()


def _images(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)
