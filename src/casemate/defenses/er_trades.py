"""ER-Trades (Li et al.): ER-Classifier with the loss of TRADES in the place of the cross-entropies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.crafting import AscentSchedule, CraftingMode, crafting
from casemate.defenses.embedding import MatchedPrior, require_batch
from casemate.defenses.trades import divergence
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.networks.base import Classifier
from casemate.trainable import Context, Update


@spec
class ERTrades(AscentSchedule, CraftingMode, MatchedPrior):
    """CE(C(Q(x)), y) + beta KL(p(x) || p(x_adv)) + lambda W1 over the codes of x and x_adv; one joint step.

    x_adv climbs the same divergence, without labels. K + 3 forwards, K input gradients and two weight
    gradients per batch. The paper gives no beta: 1 is for MNIST, 6 for CIFAR-10.
    """

    steps: Count = 40
    step_factor: Positive = 1.3333333333333333
    beta: NonNegative = 1.0

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = cast(Classifier, ctx.modules["classifier"])
        ascent = self.ascent(ctx.threat, ctx.fraction)

        start = ascent.start(x, ctx.rng, "gaussian")
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            require_batch(classifier, x)
            with torch.no_grad():
                clean = classifier(x).float().log_softmax(1)
            x_adv = ascent(lambda at: divergence(clean, classifier(at).float().log_softmax(1)), x, start)

        def entropy(codes: list[Tensor]) -> Tensor:
            logits, adversarial = (classifier.head(z).float() for z in codes)
            natural = F.cross_entropy(logits, y)
            robust = divergence(logits.log_softmax(1), adversarial.log_softmax(1)).mean()
            ctx.log(natural=natural, robust=robust)
            return natural + self.beta * robust

        yield from self.matched(ctx, [x, x_adv], entropy)
