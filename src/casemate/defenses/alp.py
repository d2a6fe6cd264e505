"""Adversarial logit pairing (Kannan, Kurakin & Goodfellow 2018), with the switches of the authors' ImageNet code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CraftingMode, JointNorm, crafting
from casemate.fields import Flag, NonNegative, Unit, spec
from casemate.objectives import cross_entropy
from casemate.threat import Goal, targeted, untargeted
from casemate.trainable import Context, Update


@spec
class ALP(AscentSchedule, CraftingMode, JointNorm, Defense):
    """Minimise CE on clean and adversarial images, averaged over both, plus weight x MSE(f(x), f(x_adv)) of logits.

    K + 2 forward passes (one over both halves of a doubled batch), K input gradients and two weight gradients per
    batch. Pairing slows the attack rather than stopping it: measure with many steps and restarts.
    """

    weight: NonNegative = 0.5
    """Of the pairing, whose square is averaged over images and classes."""
    clean_ce: Flag = True
    """Off leaves the cross-entropy on adversarial images only."""
    attack_labels: Literal["true", "predicted", "least_likely"] = "true"
    """What the attack moves away from; for "least_likely", the class that it moves towards. The last two cost a
    forward pass more."""
    label_smoothing: Unit = 0.0
    """0.1 in the ImageNet code: the true class has 1 - s + s / C."""
    bn_joint: Literal["concat", "separate"] = "concat"
    """Joint, as in the ImageNet code."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)

        start = ascent.start(x, ctx.rng)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            goal = self.goal(classifier, x, y)
            x_adv = ascent(lambda at: cross_entropy(classifier(at).float(), goal), x, start)

        def loss() -> Tensor:
            clean, adversarial = self.logits(classifier, x, x_adv)
            learned = [clean, adversarial] if self.clean_ce else [adversarial]
            ce = F.cross_entropy(torch.cat(learned), y.repeat(len(learned)), label_smoothing=self.label_smoothing)
            pairing = F.mse_loss(clean, adversarial)
            ctx.log(ce=ce, pairing=pairing)
            return ce + self.weight * pairing

        yield Update(("classifier",), loss)

    def goal(self, classifier: nn.Module, x: Tensor, y: Tensor) -> Goal:
        """What the inner problem is asked for."""
        if self.attack_labels == "true":
            return untargeted(y)
        with torch.no_grad():
            logits = classifier(x)
        return untargeted(logits.argmax(1)) if self.attack_labels == "predicted" else targeted(y, logits.argmin(1))
