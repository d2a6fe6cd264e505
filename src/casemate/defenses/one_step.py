"""What the defenses share that pay for one input gradient a batch: a growing radius, the update, the alarm."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.alarm import CollapseAlarm, accuracy
from casemate.fields import Unit, spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Update, depends


@spec
class OneStep(CollapseAlarm):
    """Fields of a one-step defense, and the update on what it has crafted."""

    ramp: Unit = 0.0
    """Share of the budget over which the radius grows linearly from 0."""

    def ramped(self, ctx: Context) -> ThreatModel:
        """The threat model with the radius of this step."""
        share = depends(ctx.fraction, lambda at: min(1.0, at / self.ramp)) if self.ramp else 1.0
        return ThreatModel(ctx.threat.norm, ctx.threat.radius * share)

    def learn(self, ctx: Context, x_adv: Tensor, y: Tensor) -> Iterator[Update]:
        """Minimise CE(f(x_adv), y). One forward pass and one weight gradient."""
        classifier = ctx.modules["classifier"]

        def loss() -> Tensor:
            logits = classifier(x_adv).float()
            ctx.log(train_robust=accuracy(logits, y))
            return F.cross_entropy(logits, y)

        yield Update(("classifier",), loss)
        self.watch(ctx)
