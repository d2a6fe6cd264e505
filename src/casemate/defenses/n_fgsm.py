"""N-FGSM: one step from strong noise, and no projection (de Jorge et al. 2022, and the authors' code)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import Ascent, crafting
from casemate.defenses.one_step import OneStep
from casemate.fields import NonNegative, Positive, spec
from casemate.objectives import cross_entropy
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Update


@spec
class NFGSM(OneStep, Defense):
    """Minimise CE(f(x_adv), y), x_adv one step of the radius from x + uniform noise of twice the radius, cut to
    [0, 1] and to nothing else: what is trained on may be 3 radii away.

    Two forward passes, one input gradient and one weight gradient per batch. With noise 1, clip 1 and a step of 1.25
    it is fgsm_rs.
    """

    noise: NonNegative = 2.0
    """Radius of the noise over the radius of the threat model: k."""
    step_factor: Positive = 1.0
    """Length of the step over the radius."""
    clip: Positive | None = None
    """Radius of a ball, over that of the threat model, on which the sum is projected; none as published."""
    bn_mode_attack: Literal["eval", "train", "train_update"] = "train_update"

    def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, threat, goal = ctx.modules["classifier"], self.ramped(ctx), untargeted(y)

        start = ThreatModel(threat.norm, self.noise * threat.radius).random_start(x, ctx.rng).clamp(0, 1)
        ball = ThreatModel(threat.norm, math.inf if self.clip is None else self.clip * threat.radius)
        fgsm = Ascent(ball, steps=1, step_size=self.step_factor * threat.radius)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = fgsm(lambda at: cross_entropy(classifier(at).float(), goal), x, start)

        yield from self.learn(ctx, x_adv, y)
