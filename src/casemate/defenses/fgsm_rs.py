"""Fast adversarial training: one step from a random start (Wong, Rice & Kolter 2020, and the authors' code)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from casemate.defenses.alarm import attacked
from casemate.defenses.base import Defense
from casemate.defenses.crafting import Ascent, crafting
from casemate.defenses.one_step import OneStep
from casemate.fields import Flag, Positive, spec
from casemate.objectives import cross_entropy
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Update

STEPS, DROP = 5, 0.2  # of the authors' early stop


@spec
class FGSMRS(OneStep, Defense):
    """Minimise CE(f(x_adv), y), x_adv one step of 1.25 radii up the cross-entropy from a start cut to [0, 1],
    projected on the ball. The network crafts in train mode, and its running statistics see the start.

    Two forward passes, one input gradient and one weight gradient per batch. Too long a step (2 radii) or schedule
    ends in catastrophic overfitting.
    """

    step_factor: Positive = 1.25
    """Length of the step over the radius."""
    init: Literal["uniform", "zero", "previous"] = "uniform"
    """The start: uniform in the ball, the image itself, or the perturbation that the batch before ended with."""
    early_stop: Flag = False
    """The authors' own rule: stop once accuracy under PGD-5 on an epoch's first batch is 20 points below that of the
    epoch before, with the weights of then."""
    bn_mode_attack: Literal["eval", "train", "train_update"] = "train_update"

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        if self.early_stop and "early_stop/x" not in ctx.state:
            ctx.state.update({"early_stop/x": x, "early_stop/y": y})
        yield from super().step(ctx, x, y)

    def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, threat, goal = ctx.modules["classifier"], self.ramped(ctx), untargeted(y)

        start = self.start(ctx, threat, x).clamp(0, 1)
        fgsm = Ascent(threat, steps=1, step_size=self.step_factor * threat.radius)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = fgsm(lambda at: cross_entropy(classifier(at).float(), goal), x, start)
        if self.init == "previous":
            ctx.state["noise"][: len(x)] = x_adv - x

        yield from self.learn(ctx, x_adv, y)

    def start(self, ctx: Context, threat: ThreatModel, x: Tensor) -> Tensor:
        """Where the step begins, not cut to the box yet."""
        if self.init == "uniform":
            return threat.random_start(x, ctx.rng)
        if self.init == "zero":
            return x
        return x + ctx.state.setdefault("noise", torch.zeros_like(x))[: len(x)]  # a last batch may be smaller

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        super().epoch_end(ctx, validate)
        if not self.early_stop or ctx.stop:
            return
        x, y = ctx.state.pop("early_stop/x"), ctx.state.pop("early_stop/y")
        classifier, threat = ctx.modules["classifier"], ctx.threat
        start = threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(classifier):
            robust, _ = attacked(Ascent(threat, STEPS, threat.radius / 4), classifier, x, y, start)
        before = float(ctx.state.get("early_stop/before", torch.tensor(0.0)))
        ctx.log(early_stop_pgd=robust)
        ctx.stop = robust < before - DROP
        ctx.keep = not ctx.stop
        ctx.state["early_stop/before"] = torch.tensor(robust)
        if ctx.stop:
            ctx.note(f"stopped early: PGD-{STEPS} leaves {robust:.1%} of the first batch, {before:.1%} before")
