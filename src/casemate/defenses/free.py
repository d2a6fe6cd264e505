"""Free adversarial training: one backward pass moves weights and noise (Shafahi et al. 2019, and their code)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.attacks.ascent import l2_step, sign_step
from casemate.defenses.alarm import accuracy
from casemate.defenses.base import Defense
from casemate.defenses.one_step import OneStep
from casemate.fields import Count, Flag, Positive, spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Update


@spec
class Free(OneStep, Defense):
    """Minimise CE(f(x + noise), y) `replays` times on each batch; the noise, carried on from batch to batch, ascends
    on the gradient of the same pass, taken before the weights move.

    One forward pass and one weight gradient per replay, in train mode. Replays count as steps, so the same epochs
    are that many times fewer passes over the data.
    """

    replays: Count = 8
    """m; 4 in the ImageNet code."""
    step_factor: Positive = 1.0
    """Length of the noise's step over the radius."""
    valid_noise: Flag = False
    """Cut the noise, too, so that x + noise is an image (the port of Wong et al.); else only the sum is cut."""

    @property
    def updates_per_batch(self) -> int:
        return self.replays

    def quick_step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier, threat = ctx.modules["classifier"], self.ramped(ctx)
        carried = ctx.state.setdefault("noise", torch.zeros_like(x))
        noise = carried[: len(x)].clone().requires_grad_()  # a last batch may be smaller

        def loss() -> Tensor:
            logits = classifier(in_box(x + noise)).float()
            ctx.log(train_robust=accuracy(logits, y))
            return F.cross_entropy(logits, y)

        yield Update(("classifier",), loss, extra_leaves=(noise,))

        assert noise.grad is not None
        with torch.no_grad():
            direction = sign_step(noise.grad) if threat.norm == "linf" else l2_step(noise.grad)
            moved = in_ball(noise + self.step_factor * threat.radius * direction, threat)
            carried[: len(x)] = (x + moved).clamp(0, 1) - x if self.valid_noise else moved
        self.watch(ctx)


def in_box(images: Tensor) -> Tensor:
    """Cut to [0, 1]. No gradient where that changes something, as in the authors' code; but `clamp` has none at 0 and
    1 themselves either, and the noise of a black pixel would never begin to move."""
    inside = (images >= 0) & (images <= 1)
    return torch.where(inside, images, images.detach().clamp(0, 1))


def in_ball(delta: Tensor, threat: ThreatModel) -> Tensor:
    """The nearest perturbation (N x ...) in the ball; the box does not count."""
    if threat.norm == "linf":
        return delta.clamp(-threat.radius, threat.radius)
    return delta.flatten(1).renorm(2, 0, threat.radius).view_as(delta)
