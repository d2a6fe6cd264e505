"""TRADES (Zhang et al. 2019): clean cross-entropy plus the divergence between clean and adversarial predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, crafting
from casemate.fields import Flag, NonNegative, spec
from casemate.trainable import Context, Update

START = 0.001  # standard deviation of the start: KL(p || p) has no gradient at x itself


@spec
class TRADES(AscentSchedule, Defense):
    """Minimise CE(f(x), y) + beta KL(p(x) || p(x_adv)), x_adv from K steps up the same divergence, in eval mode.

    Clean probabilities of the inner problem are computed once: K + 3 forward passes, K input gradients and two
    weight gradients per batch. The gradient of the outer loss flows through both arguments of the divergence.
    """

    beta: NonNegative = 6.0
    third_forward: Flag = False
    """One more clean forward in the outer loss, as published: same loss, but batch-norm statistics see x twice."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)

        noise = torch.randn(x.shape, generator=ctx.rng).to(x.device)
        with crafting(classifier), ctx.autocast():
            with torch.no_grad():
                clean = classifier(x).float().log_softmax(1)
            x_adv = ascent(lambda at: divergence(clean, classifier(at).float().log_softmax(1)), x, x + START * noise)

        def loss() -> Tensor:
            logits = classifier(x).float()
            adversarial = classifier(x_adv).float().log_softmax(1)
            reference = classifier(x).float() if self.third_forward else logits
            natural = F.cross_entropy(logits, y)
            robust = divergence(reference.log_softmax(1), adversarial).mean()
            ctx.log(natural=natural, robust=robust)
            return natural + self.beta * robust

        yield Update(("classifier",), loss)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per sample (N,), from log probabilities N x C."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
