"""How long and with what a method is trained. No torch at import: params.yaml is validated with this class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from casemate.fields import Count, Flag, Natural, NonNegative, Positive, Unit, spec

if TYPE_CHECKING:
    from torch import nn

    from casemate.trainable import Player


@spec
class Recipe:
    """Optimisation settings of a run. Everything that moves is a function of the fraction of the budget.

    `factor(t)` multiplies the learning rate, t in [0, 1] being the share of the budget spent. All schedules but
    `cyclic` begin with a linear warm-up over the first `warmup` of the budget; then

    - constant: 1
    - piecewise: `gamma` to the power of the milestones passed
    - trapezoid: 1 until `hold`, then linearly to 0
    - cyclic: linearly up to 1 at `warmup`, then linearly to 0
    - cosine: half a cosine from 1 to 0
    """

    epochs: Positive
    """Passes over the training set, replays of a batch counted; a fraction is fine (a scaled budget)."""
    lr: Positive
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Unit = 0.9
    """Of SGD."""
    nesterov: Flag = False
    weight_decay: Unit = 0.0
    """As an L2 term in the gradient."""
    decay: Literal["all", "kernels"] = "all"
    """What decays, of every player: all that it moves, or tensors of two dimensions and more, that is convolutions
    and matrices without biases and the scales of norms (Madry et al.'s TensorFlow code and what was built on it)."""
    schedule: Literal["constant", "piecewise", "trapezoid", "cyclic", "cosine"] = "constant"
    warmup: Unit = 0.0
    hold: Unit = 0.5
    milestones: tuple[Unit, ...] = (0.5, 0.75)
    gamma: Unit = 0.1
    max_grad_norm: Positive | None = None
    ema: Unit = 0.0
    """Decay of the moving average of the weights, which then are the result; 0 is off."""
    ema_warmup: Unit = 0.0
    """Share of the budget over which the average is a copy of the weights; then it begins, its decay rising to `ema`.
    0.025 in an unofficial port of DeepMind's recipe; none here, as in the figures that were measured."""
    ema_statistics: Literal["reestimated", "averaged", "live"] = "reestimated"
    """Running statistics of the average's batch norms: means over 50 training batches as the method crafts them,
    taken anew with the averaged weights before they are measured or kept; averaged as the weights are; or those of
    the weights themselves. The three are one where there is no batch norm."""
    awp: NonNegative = 0.0
    """Adversarial weight perturbation of the first player's module: the share of its norm by which each weight is
    moved while the gradient is taken (gamma: 0.01 with at_pgd, 0.005 with trades); 0 is off. See
    `casemate.training.awp`."""
    awp_warmup: Unit = 0.0
    """Share of the budget before it begins."""
    awp_statistics: Literal["moved", "own"] = "moved"
    """Where batch norms take their running statistics: at the moved weights (as published) or at their own."""
    augment: Flag = False
    """The data set's own random crop and flip."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: Flag = True
    compile: Flag = False
    """Compile the modules' forward and backward passes: for long runs on a GPU. What cannot be compiled runs as it
    is, with a warning; a method that differentiates twice cannot be."""
    cuda_graph: Flag = False
    """On a GPU, capture whole steps as CUDA graphs: small batches then run at the chip's pace, not the host's. What
    cannot be captured runs as it is, which is said once. Batches should be equal: `drop_last`."""
    fold_norms: Flag = False
    """Fold batch norms into the convolutions before them wherever a step crafts in eval mode: less to read and write
    on a GPU, no gain on a CPU."""
    noise: Literal["host", "device"] = "host"
    """Where the random draws of a step are made: on the host, the same on every device; or on the device, which a
    fast GPU with small steps needs, and which gives other draws."""
    validate_every: Natural = 1
    """Epochs between measurements on the validation split, the last epoch always; 0 is only the last."""
    select: Literal["last", "best"] = "last"
    """Which epoch's weights are the result; `best` is by robust accuracy on the validation split."""
    drop_last: Flag = False

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.momentum == 1:
            raise ValueError("momentum must be below 1")
        if self.ema == 1:
            raise ValueError("ema must be below 1")
        if self.schedule == "trapezoid" and self.hold < self.warmup:
            raise ValueError(f"hold ({self.hold}) must not come before the end of warmup ({self.warmup})")
        if self.compile and self.fold_norms:
            raise ValueError("fold_norms changes modules that compile has fixed: choose one of them")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones must be in increasing order")
        return self

    def scaled(self, budget: float) -> Recipe:
        """The same recipe with `budget` times the epochs. Schedules stretch with it."""
        return self if budget == 1 else replace(self, epochs=self.epochs * budget)

    def factor(self, t: float) -> float:
        """What the learning rate is multiplied with when the fraction `t` of the budget is spent."""
        if t < self.warmup:
            return t / self.warmup
        if self.schedule == "piecewise":
            return float(self.gamma ** sum(t >= m for m in self.milestones))
        if self.schedule == "trapezoid":
            return 1.0 if t <= self.hold else (1 - t) / (1 - self.hold)
        if self.schedule == "constant" or self.warmup == 1:
            return 1.0
        share = (t - self.warmup) / (1 - self.warmup)
        return 1 - share if self.schedule == "cyclic" else (1 + math.cos(math.pi * share)) / 2

    def batches(self, samples: int) -> int:
        """Batches in one pass over a training set of that size."""
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def player(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        after_step: Callable[[], None] | None = None,
        **changes: Any,
    ) -> Player:
        """A Player with this recipe's optimizer, schedule, clipping and precision: `Task.player`.

        Args:
            parameters: what it moves; those that need no gradient are left out.
            lr_scale: multiplies the learning rate, for a player whose rate follows the recipe's.
            betas: of Adam.
            after_step: called after each optimizer step, e.g. weight clipping.
            changes: fields of the recipe that are different for this player, e.g. `optimizer="adam", lr=2e-4`.
        """
        from casemate.trainable import Player

        recipe = replace(self, **changes) if changes else self
        moved = [p for p in parameters if p.requires_grad]
        return Player(
            parameters=moved,
            optimizer=_optimizer(recipe, moved, recipe.lr * lr_scale, betas),
            schedule=recipe.factor,
            max_grad_norm=recipe.max_grad_norm,
            after_step=after_step,
            precision=recipe.precision,
        )

    def as_dict(self) -> dict[str, Any]:
        """Every field, JSON-able."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> Any:
    import torch

    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    groups = parameters if recipe.decay == "all" else _decayed(parameters, recipe.weight_decay)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(
        groups,
        lr=lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


def _decayed(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups, none of them empty: kernels, which decay, and the rest."""
    kernels, rest = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return [
        {"params": found, "weight_decay": decay} for found, decay in ((kernels, weight_decay), (rest, 0.0)) if found
    ]
