"""FeaAttack: towards the features of images of other classes, where a loss on logits has been flattened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.ascent import l2_step, sign_step
from casemate.attacks.base import Attack, Cost
from casemate.attacks.minimise import Live, Pixels, Task, at_success, by_margin, minimise, never
from casemate.attacks.optimizers import Descent
from casemate.errors import UserError
from casemate.fields import Count, Positive, spec
from casemate.networks.base import Classifier
from casemate.seeding import generator
from casemate.system import View
from casemate.threat import Goal, ThreatModel


@spec
class Feature(Attack):
    """FeaAttack (Line290/FeatureAttack on GitHub; ADT, appendix): minimise 1 - cos(phi(x'), phi(target image)).

    phi is what the classifier's head reads. Every image is moved towards `targets` images of other classes, drawn
    with replacement from the batch it is attacked in; with a targeted goal, towards images of the target class. One
    target after another, from a random start each, on the images that still stand: it falls if any copy does, at any
    iterate. Raises UserError if the system shows no such features, or the batch holds no image to move towards.
    """

    reads_layers: ClassVar[bool] = True

    targets: Count = 200
    steps: Count = 50
    step_size: Positive | None = None
    """In pixel units."""
    relative_step: Positive = 0.125
    """Step size over radius, where no `step_size` is given: 1/255 at 8/255."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        drawn = self._drawn(goal, seed)
        size = self.step_size or self.relative_step * threat.radius
        move = Descent(size, sign_step if threat.norm == "linf" else l2_step)
        out, best = x, x.new_full((len(x),), torch.inf)
        standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
        with seen_by_head(view) as seen:

            def apart(logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
                return 1 - F.cosine_similarity(seen.features, live.own["wanted"])

            with torch.no_grad():
                view.logits(x)
            cost.queries += 1
            phi = seen.features
            for number in range(self.targets):
                start = threat.random_start(x, generator(seed, "feature start", number))
                ends = at_success if view.exact else never
                task = Task(Pixels(threat, start), move, apart, by_margin(view), self.steps, ends, judge_last=True)
                own = {"wanted": phi[drawn[:, number]]}
                found = minimise(task, view, x, goal, cost, own, among=standing)
                hit = found.score < torch.inf
                ended = torch.where(_images(hit), found.x_adv, found.last)
                out = torch.where(_images((found.score < best) | (standing & best.isinf())), ended, out)
                best = torch.minimum(best, found.score)
                if view.exact:
                    standing = standing & ~hit
                    if not bool(standing.any()):
                        break
        return out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.targets * self.steps
        return looks * view.passes[0], looks * view.passes[1], n * (1 + self.targets)

    def _drawn(self, goal: Goal, seed: int) -> Tensor:
        """(N, targets) long: positions in the batch."""
        labels = goal.labels.cpu()
        same = labels[None] == (labels if goal.targets is None else goal.targets.cpu())[:, None]
        allowed = ~same if goal.targets is None else same
        if not bool(allowed.any(1).all()):
            wanted = "another class" if goal.targets is None else "the target class"
            raise UserError(f"attack Feature moves towards images of {wanted}, and the batch holds none: attack more")
        rng = generator(seed, "feature targets")
        return torch.multinomial(allowed.float(), self.targets, replacement=True, generator=rng).to(
            goal.labels.device
        )


class Seen:
    """What the head was last given (L x d), with its graph."""

    features: Tensor

    def __call__(self, head: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.features = given[0].flatten(1)


@contextmanager
def seen_by_head(view: View) -> Iterator[Seen]:
    """While open, the features behind the view's latest logits. Raises UserError if nobody can look inside."""
    classifier = getattr(view.system, "classifier", None)
    if not isinstance(classifier, Classifier):
        raise UserError(
            "attack Feature needs the features of the classifier, and this system shows none: only networks of "
            "casemate.networks have them"
        )
    seen = Seen()
    hook = classifier.head.register_forward_pre_hook(seen)
    try:
        yield seen
    finally:
        hook.remove()


def _images(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)
