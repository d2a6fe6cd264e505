"""The alarm of defenses that craft with one step: robust accuracy that is suddenly gone (catastrophic overfitting).

Within an epoch or two such a network learns to fool the one step: accuracy under it jumps up, accuracy under a longer
attack falls to nothing (Wong et al. 2020, Andriushchenko & Flammarion 2020). No loss curve shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.crafting import Ascent, crafting
from casemate.fields import Count, spec
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context

Measured = tuple[float, float, float]
"""Accuracy in an epoch, as fractions: under PGD-10, under FGSM, and in training as the defense logs it (or nan)."""
Collapse = Literal["robustness lost", "catastrophic overfitting"]

IMAGES, STEPS = 256, 10
LOST = 0.5  # of the best accuracy under PGD so far
GAP, JUMP, NEAR = 0.20, 0.10, 3  # signs of overfitting: FGSM over PGD, a rise of training accuracy; epochs between


@spec
class CollapseAlarm:
    """Fields and `epoch_end` of a defense that may collapse. `step` calls `watch` after its update."""

    alarm: Literal["off", "warn", "stop"] = "warn"
    """After each epoch 256 fixed training images are attacked with PGD-10 and FGSM. "stop" ends training with the
    weights of the last epoch before the collapse; neither of the others changes the result."""
    alarm_after: Count = 5
    """The first epoch that can be called a collapse: before it a network may just begin to learn."""

    def watch(self, ctx: Context) -> None:
        """Take in the accuracy that the step has logged as `train_robust`."""
        if self.alarm != "off":
            right = ctx.logs["train_robust"]
            ctx.state["alarm/train"] = ctx.state.get("alarm/train", 0) + torch.stack([right, torch.ones_like(right)])

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        if self.alarm == "off":
            return
        classes, row = self._measure(ctx)
        before: list[list[float]] = ctx.state["alarm/curve"].tolist() if "alarm/curve" in ctx.state else []
        ctx.state["alarm/curve"] = torch.tensor([*before, row])
        now, known = (collapse(rows, classes, self.alarm_after) for rows in ([*before, row], before))
        ctx.log(collapsed=float(now is not None))
        if now is None:
            ctx.keep = self.alarm == "stop"
            return
        if known is None:
            best = max(pgd for pgd, _, _ in before)
            ctx.note(
                f"warning: {now} in epoch {len(before) + 1}: PGD-{STEPS} leaves {row[0]:.1%} of {IMAGES} training "
                f"images, {best:.1%} at best before, FGSM {row[1]:.1%}; "
                + ("stopped at the epoch before" if self.alarm == "stop" else "alarm: stop would end training")
            )
        ctx.stop = ctx.stop or self.alarm == "stop"

    def _measure(self, ctx: Context) -> tuple[int, Measured]:
        """(number of classes, accuracies), and what is worth a curve in the log. Images are the same every epoch."""
        if "alarm/x" not in ctx.state:
            ctx.state["alarm/x"], ctx.state["alarm/y"] = ctx.draw(IMAGES)
        x, y = ctx.state["alarm/x"], ctx.state["alarm/y"]
        classifier, threat = ctx.modules["classifier"], ctx.threat
        start = threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(classifier):
            pgd, logits = attacked(Ascent(threat, STEPS, threat.radius / 4), classifier, x, y, start)
            fgsm, _ = attacked(Ascent(threat, 1, threat.radius), classifier, x, y, x)
            alignment = F.cosine_similarity(_slope(classifier, x, y), _slope(classifier, start, y)).mean()
        ctx.log(alarm_pgd=pgd, alarm_fgsm=fgsm, alarm_alignment=alignment)
        train = ctx.state.pop("alarm/train", None)
        return logits.shape[1], (pgd, fgsm, float("nan") if train is None else float(train[0] / train[1]))


def collapse(rows: Sequence[Sequence[float]], num_classes: int, after: int) -> Collapse | None:
    """What the `Measured` rows of epochs 1, 2, ... show, the last one included.

    Robustness is lost where accuracy under PGD is below half of its best so far, from epoch `after` on and once the
    best was above twice chance. It is catastrophic overfitting if, within three epochs of that, FGSM leaves 20 points
    more than PGD or the accuracy in training rose by more than 10. The thresholds separate the 48 collapsed of 186
    public runs of one-step methods; a drop of 20 points alone cannot be seen where robustness is below 20 %.
    """
    pgd = [row[0] for row in rows]
    lost = [
        e for e in range(1, len(rows))
        if e + 1 >= after and max(pgd[:e]) > 2 / num_classes and pgd[e] < LOST * max(pgd[:e])
    ]  # fmt: skip
    if not lost:
        return None
    signs = [e for e in range(1, len(rows)) if rows[e][1] - pgd[e] > GAP or rows[e][2] - rows[e - 1][2] > JUMP]
    near = any(abs(e - sign) <= NEAR for e in lost for sign in signs)
    return "catastrophic overfitting" if near else "robustness lost"


def attacked(ascent: Ascent, classifier: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """(accuracy as a fraction, logits) on what the ascent of the cross-entropy makes of `x` from `start`."""
    goal = untargeted(y)
    x_adv = ascent(lambda at: cross_entropy(classifier(at).float(), goal), x, start)
    with torch.no_grad():
        logits = classifier(x_adv)
    return float(accuracy(logits, y)), logits


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows of `logits` (N x C) whose largest entry is at `y`: a scalar tensor."""
    return (logits.argmax(1) == y).float().mean()


def _slope(classifier: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the cross-entropy, N x d."""
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(at).float(), y, reduction="sum"), at)
    return gradient.flatten(1)
