"""What the defenses share that pay for one input gradient a batch: a growing radius, the update, the alarm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.alarm import CollapseAlarm, accuracy
from casemate.defenses.crafting import Ascent, BatchNormMode, crafting
from casemate.fields import Unit, spec
from casemate.objectives import cross_entropy
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Update, depends


@spec
class OneStep(CollapseAlarm):
    """Fields of a one-step defense, and the update on what it has crafted. It says how in `quick_step`."""

    ramp: Unit = 0.0
    """Share of the budget over which the radius grows linearly from 0."""

    def ramped(self, ctx: Context) -> ThreatModel:
        """The threat model with the radius of this step."""
        share = depends(ctx.fraction, lambda at: min(1.0, at / self.ramp)) if self.ramp else 1.0
        return ThreatModel(ctx.threat.norm, ctx.threat.radius * share)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield from self.slow_step(ctx, x, y) if self.fallen_back(ctx) else self.quick_step(ctx, x, y)

    @abstractmethod
    def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        """One batch as the method has it."""

    def slow_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        """One batch after the alarm has fallen back: CE(f(x_adv), y), x_adv from two steps of half the radius, from a
        uniform start cut to [0, 1]. Three forward passes, two input gradients and one weight gradient."""
        classifier, threat, goal = ctx.modules["classifier"], self.ramped(ctx), untargeted(y)

        start = threat.random_start(x, ctx.rng).clamp(0, 1)
        pgd = Ascent(threat, steps=2, step_size=threat.radius / 2)
        mode: BatchNormMode = getattr(self, "bn_mode_attack", "train_update")  # `free` has no choice
        with crafting(classifier, bn=mode), ctx.autocast():
            x_adv = pgd(lambda at: cross_entropy(classifier(at).float(), goal), x, start)

        yield from self.learn(ctx, x_adv, y)

    def learn(self, ctx: Context, x_adv: Tensor, y: Tensor) -> Iterator[Update]:
        """Minimise CE(f(x_adv), y). One forward pass and one weight gradient."""
        classifier = ctx.modules["classifier"]

        def loss() -> Tensor:
            logits = classifier(x_adv).float()
            ctx.log(train_robust=accuracy(logits, y))
            return F.cross_entropy(logits, y)

        yield Update(("classifier",), loss)
        self.watch(ctx)
