"""Bilateral adversarial training (Wang and Zhang 2019): the image and the label are both perturbed.

One targeted step on the image, a closed form for the label. Training follows the authors' code
(wjyouch/bilateral-adversarial-training). The labels shrink the gradients of the input, so that untargeted attacks on
the cross-entropy overestimate this defense by far; targeted and scale-free ones do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CraftingMode, crafting
from casemate.errors import UserError
from casemate.fields import Count, Flag, Positive, spec
from casemate.networks.base import Classifier
from casemate.objectives import cross_entropy
from casemate.threat import Goal
from casemate.trainable import Context, Task, Update

POSITIVE = 1e-4  # from which on a margin counts as one


@spec
class Bilateral(AscentSchedule, CraftingMode, Defense):
    """Minimise soft CE(f(x_adv), y_adv): x_adv is K steps towards a wrong class, y_adv moves mass to unlikely ones.

    The target and the label come from the clean prediction in the mode of crafting; the step starts at a uniform
    point that is not cut to [0, 1]. K + 2 forward passes, K input gradients and one weight gradient per batch.
    """

    steps: Count = 1
    step_factor: Positive = 1.0
    target: Literal["most_confusing", "random", "mosa", "mix"] = "most_confusing"
    """The class aimed at: the likeliest wrong one (R-MC), any wrong one (R-RAND), the one whose boundary is nearest
    in the space of the features (R-MOSA), or the nearest where the clean prediction is right, else the likeliest."""
    label_adversary: Flag = True
    """The label moves, too ("-LA"); False trains on the true one."""
    beta: Positive = 9.0
    """The true class keeps `beta` times the largest share of a wrong one, for every image."""
    gamma: Positive = 0.01
    """What a class gets before its unlikeliness counts."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        modules = super().modules(task)
        if self.target in ("mosa", "mix"):
            head_weight(modules["classifier"], self.target)
        return modules

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)

        start = ascent.start(x, ctx.rng, "uniform")
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            with torch.no_grad():
                clean = classifier(x).float()
            goal = Goal(y, self.aim(clean, y, classifier, ctx.rng))
            x_adv = ascent(lambda at: cross_entropy(classifier(at).float(), goal), x, start)
        if self.label_adversary:
            labels = adversarial_labels(clean.softmax(1), y, self.beta, self.gamma)
        else:
            labels = F.one_hot(y, clean.shape[1]).float()
        ctx.log(label_kept=labels.gather(1, y[:, None]).mean())

        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x_adv).float(), labels))

    def aim(self, clean: Tensor, y: Tensor, classifier: nn.Module, rng: torch.Generator) -> Tensor:
        """The targets (N,), never the label, from clean logits N x C."""
        if self.target == "random":
            others = torch.randint(1, clean.shape[1], y.shape, generator=rng).to(y.device)
            return (y + others) % clean.shape[1]
        confusing = clean.scatter(1, y[:, None], -torch.inf).argmax(1)
        if self.target == "most_confusing":
            return confusing
        nearest = nearest_boundary(clean, y, head_weight(classifier, self.target), confusing)
        return nearest if self.target == "mosa" else torch.where(clean.argmax(1) == y, nearest, confusing)


def adversarial_labels(chances: Tensor, y: Tensor, beta: float, gamma: float) -> Tensor:
    """N x C targets from clean probabilities N x C; each row sums to 1, and y has `beta` times the largest other.

    With v = -log p, a wrong class has a share in proportion to v - v_min + gamma, v_min being that of the likeliest
    wrong class: the labels that raise the loss most, under that one condition.
    """
    own = F.one_hot(y, chances.shape[1]).bool()
    v = -(chances + 1e-8).log()
    least = v.masked_fill(own, torch.inf).amin(1, keepdim=True)
    shares = (v - least + gamma).masked_fill(own, 0)
    shares = shares / shares.sum(1, keepdim=True)
    moved = 1 / (1 + beta * shares.amax(1, keepdim=True))
    return (moved * shares).masked_fill(own, 0) + (1 - moved) * own


def nearest_boundary(logits: Tensor, y: Tensor, weight: Tensor, otherwise: Tensor) -> Tensor:
    """argmin over j of (z_y - z_j) / |w_y - w_j|_2 among positive margins (N,); `otherwise` where there is none.

    `weight` (C x d) is that of the last layer, so this is the distance to the boundary in the space it reads.
    """
    margins = logits.gather(1, y[:, None]) - logits
    distances = margins / (weight[y][:, None] - weight).norm(dim=2).clamp_min(torch.finfo(weight.dtype).tiny)
    distances = distances.masked_fill(margins <= POSITIVE, torch.inf)
    return torch.where(distances.isfinite().any(1), distances.argmin(1), otherwise)


def head_weight(classifier: nn.Module, target: str) -> Tensor:
    """The weight (C x d) of the last layer. Raises UserError if that is not linear."""
    head = cast(Classifier, classifier).head
    if not isinstance(head, nn.Linear):
        raise UserError(f"bilateral: target {target!r} needs a linear last layer, not {type(head).__name__}")
    return head.weight.detach()
