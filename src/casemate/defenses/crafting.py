"""How defenses craft adversarial examples inside a training step: module modes, starts, and the schedule of the
ascent; and the options for what papers do differently about batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casemate.attacks.ascent import ascend, l2_step, sign_step
from casemate.defenses.folding import folded
from casemate.errors import UserError
from casemate.fields import Count, Natural, Positive, Unit, spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, depends

BatchNormMode = Literal["eval", "train", "train_update"]
Start = Literal["clipped", "uniform", "gaussian"]
SPREAD = 0.001
"""Standard deviation of a Gaussian start."""


@contextmanager
def crafting(*modules: nn.Module, bn: BatchNormMode = "eval") -> Iterator[None]:
    """While open: no parameter needs a gradient, and every module is in the mode that the paper crafts in.

    "eval" uses the running statistics; "train" those of the batch, and keeps the running ones untouched;
    "train_update" is plain train mode, each forward pass moving the running statistics. Train modes switch
    dropout on, too. Flags and modes are put back as they were. In "eval" mode batch norms are folded where the recipe
    says so (see `casemate.defenses.folding`).
    """
    parameters = [(p, p.requires_grad) for m in modules for p in m.parameters()]
    parts = [(part, part.training) for m in modules for part in m.modules()]
    norms = [(part, part.track_running_stats) for part, _ in parts if isinstance(part, _BatchNorm)]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for part, _ in parts:
            part.training = bn != "eval"
        if bn == "train":
            for norm, _ in norms:
                norm.track_running_stats = False
        with folded(*modules) if bn == "eval" else nullcontext():
            yield
    finally:
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
        for part, training in parts:
            part.training = training
        for norm, tracking in norms:
            norm.track_running_stats = tracking


@dataclass(frozen=True)
class Ascent:
    """What one batch is crafted with: the (ramped) threat model, number of steps, step size in pixel units."""

    threat: ThreatModel
    steps: int
    step_size: float

    def __call__(self, loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor) -> Tensor:
        """Ascend the per-sample `loss` from `start`, in the geometry of the threat model."""
        direction = sign_step if self.threat.norm == "linf" else l2_step
        return ascend(loss, x, start, self.threat, steps=self.steps, step_size=self.step_size, direction=direction)

    def start(self, x: Tensor, rng: torch.Generator, how: Start = "clipped") -> Tensor:
        """Where the ascent begins: a uniform point of the ball, cut to [0, 1] or ("uniform") not; or ("gaussian")
        0.001 N(0, I) from `x`, not cut: a divergence from `x` has no gradient at `x` itself."""
        if how == "gaussian":
            return x + SPREAD * torch.randn(x.shape, generator=rng).to(x.device)
        start = self.threat.random_start(x, rng)
        return start.clamp(0, 1) if how == "clipped" else start


@spec
class AscentSchedule:
    """Fields of a defense that crafts by projected ascent, and what they come to at a fraction of the budget."""

    steps: Count = 10
    step_size: Positive | None = None
    """In pixel units. Without it the step is `step_factor` x radius / steps, with the ramped radius."""
    step_factor: Positive = 2.5
    """2.5 with 10 steps is the 2/255 of the usual 8/255 recipe."""
    ramp: Unit = 0.0
    """Share of the budget over which the radius grows linearly from 0. Small networks at a large radius need it."""
    plan: tuple[tuple[Unit, Count], ...] = ()
    """Changes of `steps`: pairs (fraction of the budget from which it holds, steps), in ascending order."""

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.plan]
        if starts != sorted(set(starts)):
            raise UserError(f"plan: the fractions must ascend, not {', '.join(f'{s:g}' for s in starts)}")

    @property
    def first_steps(self) -> int:
        """Steps before any change."""
        return self.steps

    def ascent(self, threat: ThreatModel, fraction: float) -> Ascent:
        """The ascent at a `fraction` of the budget in [0, 1)."""
        return depends(fraction, lambda at: self._ascent(threat, at))

    def _ascent(self, threat: ThreatModel, fraction: float) -> Ascent:
        steps = self.first_steps
        for start, planned in self.plan:
            if fraction >= start:
                steps = planned
        share = min(1.0, fraction / self.ramp) if self.ramp else 1.0
        ramped = ThreatModel(threat.norm, threat.radius * share)
        size = self.step_factor * ramped.radius / steps if self.step_size is None else self.step_size
        return Ascent(ramped, steps, size)


@spec
class CraftingMode:
    """Field of a defense for the statistics that it crafts with."""

    bn_mode_attack: Literal["eval", "train", "train_update"] = "eval"
    """Mode of the classifier while images are crafted, see `crafting`: "eval" reads the running statistics, "train"
    those of the batch, and "train_update" moves the running ones by every pass."""


@spec
class JointNorm:
    """Field of a defense that learns from clean and adversarial images at once."""

    bn_joint: Literal["concat", "separate"] = "separate"
    """Whether clean and adversarial images share their batch statistics, in one forward pass, or each have their
    own."""

    def logits(self, classifier: nn.Module, *images: Tensor) -> Sequence[Tensor]:
        """Logits of each batch of `images`, in float32."""
        if self.bn_joint == "concat":
            return torch.split(classifier(torch.cat(images)).float(), [len(batch) for batch in images])
        return [classifier(batch).float() for batch in images]


@spec
class CleanForward:
    """Field of a defense whose weights learn from adversarial images alone."""

    clean_forward_every: Natural = 0
    """Every so many steps one more forward pass, of the clean batch in train mode after the updates: it is logged as
    `train_clean`, and the running statistics see clean images through it. 10 in the authors' code; 0 is never. A run
    with it is not captured as CUDA graphs, whose steps are all alike."""

    def look_at_clean(self, ctx: Context, x: Tensor, y: Tensor) -> None:
        """That pass, if it is due."""
        if self.clean_forward_every and ctx.step % self.clean_forward_every == 0:
            clean_accuracy(ctx, x, y)


def clean_accuracy(ctx: Context, x: Tensor, y: Tensor) -> None:
    """Log `train_clean`, the classifier's accuracy on a batch in the mode it is in."""
    with ctx.autocast():
        ctx.log(train_clean=(predicted(ctx.modules["classifier"], x) == y).float().mean())


@torch.no_grad()
def predicted(classifier: nn.Module, x: Tensor) -> Tensor:
    """Labels (N,) that the classifier gives, in the mode it is in."""
    labels: Tensor = classifier(x).argmax(1)
    return labels
