"""TRADES (Zhang et al. 2019): clean cross-entropy plus the divergence between clean and adversarial predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CraftingMode, JointNorm, crafting
from casemate.fields import Flag, NonNegative, spec
from casemate.trainable import Context, Update


@spec
class TRADES(AscentSchedule, CraftingMode, JointNorm, Defense):
    """Minimise CE(f(x), y) + beta KL(p(x) || p(x_adv)), x_adv from K steps up the same divergence.

    Clean probabilities of the inner problem are computed once: K + 3 forward passes, K input gradients and two
    weight gradients per batch. The gradient of the outer loss flows through both arguments of the divergence.
    """

    beta: NonNegative = 6.0
    third_forward: Flag = False
    """One more clean forward in the outer loss, as published: same loss, but batch-norm statistics see x twice."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)

        start = ascent.start(x, ctx.rng, "gaussian")
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            with torch.no_grad():
                clean = classifier(x).float().log_softmax(1)
            x_adv = ascent(lambda at: divergence(clean, classifier(at).float().log_softmax(1)), x, start)

        def loss() -> Tensor:
            logits, adversarial, *third = self.logits(classifier, x, x_adv, *([x] if self.third_forward else []))
            reference = third[0] if third else logits
            natural = F.cross_entropy(logits, y)
            robust = divergence(reference.log_softmax(1), adversarial.log_softmax(1)).mean()
            ctx.log(natural=natural, robust=robust)
            return natural + self.beta * robust

        yield Update(("classifier",), loss)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per sample (N,), from log probabilities N x C."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
