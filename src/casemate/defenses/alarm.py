"""The alarm of defenses that craft with one step: robust accuracy that is suddenly gone (catastrophic overfitting).

Within an epoch or two such a network learns to fool the one step: accuracy under it jumps up, accuracy under a longer
attack falls to nothing (Wong et al. 2020, Andriushchenko & Flammarion 2020). No loss curve shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.crafting import Ascent, crafting
from casemate.fields import Count, Natural, spec
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context, Trainable

Collapse = Literal["robustness lost", "catastrophic overfitting"]
NAN = float("nan")

IMAGES, STEPS = 256, 10
LOST = 0.5  # of the best accuracy under PGD so far
GAP, JUMP, NEAR = 0.20, 0.10, 3  # signs of overfitting: FGSM over PGD, a rise of training accuracy; epochs between
DROP = 0.5  # a learning rate that fell to this share or less explains such a rise


class Measured(NamedTuple):
    """What one look has found; accuracies are fractions."""

    epoch: float
    """The number of the epoch that it was made in, from 1."""
    pgd: float
    """Under PGD-10, on the alarm's images."""
    fgsm: float
    train: float = NAN
    """In training as the defense logs it, over the whole epoch; nan before its end."""
    began: float = 1.0
    """By what the learning rate was multiplied in the epoch's first batch."""
    ended: float = 1.0
    """And in the last one so far."""


@spec
class CollapseAlarm(Trainable):
    """Fields and `look` of a defense that may collapse. `step` calls `watch` after its update."""

    alarm: Literal["off", "warn", "stop", "fallback_pgd"] = "warn"
    """After each epoch 256 fixed training images are attacked with PGD-10 and FGSM. If that shows a collapse, "stop"
    ends training with the weights of the last look before it; "fallback_pgd" puts them back, with the optimizer and
    the moving average, and crafts by PGD-2 in half radii up to the end of the epoch, or of the next if it was over.
    Neither of the others changes the result."""
    alarm_every: Natural = 200
    """Steps between further looks within an epoch; 0 is none."""
    alarm_after: Count = 5
    """The first epoch that can be called a collapse: before it a network may just begin to learn."""

    def watch(self, ctx: Context) -> None:
        """Take in the accuracy that the step has logged as `train_robust`, unless PGD-2 has crafted."""
        if self.alarm != "off" and not self.fallen_back(ctx):
            right = ctx.logs["train_robust"]
            ctx.state["alarm/train"] = ctx.state.get("alarm/train", 0) + torch.stack([right, torch.ones_like(right)])

    def fallen_back(self, ctx: Context) -> bool:
        """Whether this step is to be crafted by PGD-2."""
        return "alarm/fallen" in ctx.state

    def look(self, ctx: Context, factor: float, *, epoch_over: bool) -> Literal["hold", "go back"] | None:
        """See `casemate.training.state.Watchful`."""
        if self.alarm == "off":
            return None
        began = ctx.state.setdefault("alarm/began", torch.tensor(factor))
        due = self.alarm_every and (ctx.step + 1) % self.alarm_every < self.updates_per_batch
        if not (due or epoch_over):
            return None
        epoch = ctx.epoch + 1
        classes, pgd, fgsm = self._measure(ctx, log=epoch_over)
        train = ctx.state.pop("alarm/train", None) if epoch_over else None
        accuracy_in_training = NAN if train is None else float(train[0] / train[1])
        row = Measured(epoch, pgd, fgsm, accuracy_in_training, float(began), factor)
        curve = torch.tensor([*(ctx.state["alarm/curve"].tolist() if "alarm/curve" in ctx.state else []), row])
        rows = [Measured(*values) for values in curve.tolist()]  # all of them rounded alike, read anew or not
        found, known = (collapse(some, classes, self.alarm_after) for some in (rows, rows[:-1]))
        if epoch_over:
            ctx.log(collapsed=float(found is not None))
            ctx.state.pop("alarm/began")
            if "alarm/fallen" in ctx.state and float(ctx.state["alarm/fallen"]) <= epoch:
                ctx.state.pop("alarm/fallen")
        if found is not None and known is None:
            self._say(ctx, found, rows)
        if found is not None and self.alarm == "fallback_pgd":
            ctx.log(fell_back=1.0)
            ctx.state.pop("alarm/train", None)  # in part of weights that are no more
            ctx.state["alarm/fallen"] = torch.tensor(float(epoch + epoch_over))
            return "go back"
        ctx.state["alarm/curve"] = curve
        ctx.keep = found is None and self.alarm == "stop"
        ctx.stop = ctx.stop or (found is not None and self.alarm == "stop")
        return "hold" if self.alarm == "fallback_pgd" else None

    def _say(self, ctx: Context, found: Collapse, rows: Sequence[Measured]) -> None:
        done = {
            "stop": "stopped at the look before",
            "fallback_pgd": "back to the look before, and on with PGD-2",
        }.get(self.alarm, "alarm: stop would end training")
        row, best = rows[-1], max(row.pgd for row in rows[:-1])
        ctx.note(
            f"warning: {found} in epoch {row.epoch:.0f}: PGD-{STEPS} leaves {row.pgd:.1%} of {IMAGES} training "
            f"images, {best:.1%} at best before, FGSM {row.fgsm:.1%}; {done}"
        )

    def _measure(self, ctx: Context, *, log: bool) -> tuple[int, float, float]:
        """(number of classes, accuracy under PGD, under FGSM), and with `log` what is worth a curve in the log.
        Images are the same each time."""
        if "alarm/x" not in ctx.state:
            ctx.state["alarm/x"], ctx.state["alarm/y"] = ctx.draw(IMAGES)
        x, y = ctx.state["alarm/x"], ctx.state["alarm/y"]
        classifier, threat = ctx.modules["classifier"], ctx.threat
        start = threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(classifier):
            pgd, logits = attacked(Ascent(threat, STEPS, threat.radius / 4), classifier, x, y, start)
            fgsm, _ = attacked(Ascent(threat, 1, threat.radius), classifier, x, y, x)
            if log:
                alignment = F.cosine_similarity(_slope(classifier, x, y), _slope(classifier, start, y)).mean()
                ctx.log(alarm_pgd=pgd, alarm_fgsm=fgsm, alarm_alignment=alignment)
        return logits.shape[1], pgd, fgsm


def collapse(rows: Sequence[Measured], num_classes: int, after: int) -> Collapse | None:
    """What the looks so far show, in their order, the last one included.

    Robustness is lost where accuracy under PGD is below half of its best so far, from epoch `after` on and once the
    best was above twice chance. It is catastrophic overfitting if, within three epochs of that, FGSM leaves 20 points
    more than PGD or the accuracy in training rose by more than 10 from one epoch to the next without a learning rate
    that fell meanwhile. The thresholds separate the 48 collapsed of 186 public runs of one-step methods; a drop of 20
    points alone cannot be seen where robustness is below 20 %.
    """
    pgd = [row.pgd for row in rows]
    lost = [
        row.epoch for at, row in enumerate(rows)
        if at and row.epoch >= after and max(pgd[:at]) > 2 / num_classes and row.pgd < LOST * max(pgd[:at])
    ]  # fmt: skip
    if not lost:
        return None
    signs = [row.epoch for row in rows[1:] if row.fgsm - row.pgd > GAP]
    whole = [row for row in rows if row.train == row.train]
    signs += [after.epoch for before, after in itertools.pairwise(whole) if _jumped(before, after)]
    near = any(abs(epoch - sign) <= NEAR for epoch in lost for sign in signs)
    return "catastrophic overfitting" if near else "robustness lost"


def _jumped(before: Measured, after: Measured) -> bool:
    """Whether accuracy in training jumped from one epoch to the next, and the learning rate does not explain it."""
    adjacent, dropped = after.epoch - before.epoch == 1, after.ended <= DROP * before.began
    return adjacent and not dropped and after.train - before.train > JUMP


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
