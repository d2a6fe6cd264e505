"""Adversarial training on the untargeted fast gradient sign (Goodfellow et al. 2015), without a random start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import Ascent, crafting
from casemate.defenses.one_step import OneStep
from casemate.fields import spec
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context, Update


@spec
class FGSMUT(OneStep, Defense):
    """Minimise CE(f(x_adv), y), x_adv one step of the whole radius from x itself up the cross-entropy.

    Two forward passes, one input gradient and one weight gradient per batch. Expect it to break: it leaks the label
    and overfits catastrophically, which makes it the control of whatever claims to see that.
    """

    bn_mode_attack: Literal["eval", "train", "train_update"] = "eval"

    def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, threat, goal = ctx.modules["classifier"], self.ramped(ctx), untargeted(y)

        fgsm = Ascent(threat, steps=1, step_size=threat.radius)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = fgsm(lambda at: cross_entropy(classifier(at).float(), goal), x, start=x)

        yield from self.learn(ctx, x_adv, y)
