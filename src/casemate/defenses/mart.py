"""MART (Wang et al. 2020): misclassification-aware adversarial training, as in the authors' code."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CraftingMode, JointNorm, crafting
from casemate.fields import NonNegative, spec
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context, Update

ROOM, TINY = 1.0001, 1e-12  # keep the logarithm of 1 - p finite


@spec
class MART(AscentSchedule, CraftingMode, JointNorm, Defense):
    """Minimise BCE(f(x_adv), y) + beta mean[KL(p(x) || p(x_adv)) (1 - p_y(x))]: images that are wrong before any
    attack weigh most. x_adv from K steps up the cross-entropy.

    K + 2 forward passes (the last two over f(x) and f(x_adv), in train mode), K input gradients and two weight
    gradients per batch. The gradient flows through the weight and both arguments of the divergence.
    """

    beta: NonNegative = 5.0
    """5 for ResNet-18, 6 for WRN-34-10."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, goal = ctx.modules["classifier"], untargeted(y)
        ascent = self.ascent(ctx.threat, ctx.fraction)

        start = ascent.start(x, ctx.rng, "gaussian")
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = ascent(lambda at: cross_entropy(classifier(at).float(), goal), x, start)

        def loss() -> Tensor:
            clean, adversarial = (z.log_softmax(1) for z in self.logits(classifier, x, x_adv))
            divergence = F.kl_div(adversarial, clean, reduction="none", log_target=True).sum(1)
            missed = 1 - clean.exp().gather(1, y[:, None])[:, 0]
            boosted, weighted = boosted_cross_entropy(adversarial, y).mean(), (divergence * missed).mean()
            ctx.log(boosted=boosted, weighted=weighted)
            total: Tensor = boosted + self.beta * weighted
            return total

        yield Update(("classifier",), loss)


def boosted_cross_entropy(log_p: Tensor, y: Tensor) -> Tensor:
    """CE minus log(1.0001 - p of the strongest wrong class), per sample (N,), from log probabilities N x C."""
    wrong = log_p.exp().scatter(1, y[:, None], 0.0).amax(1)
    return F.nll_loss(log_p, y, reduction="none") - (ROOM - wrong + TINY).log()
