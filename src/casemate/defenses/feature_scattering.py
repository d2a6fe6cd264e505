"""Feature Scattering (Zhang and Wang 2019): the batch is perturbed so that it costs most to carry its codes back.

The inner problem has no labels and is one number for the whole batch: the optimal transport cost between the clean
codes and the perturbed ones. Training follows the authors' code (Haichao-Zhang/FeatureScatter).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CleanForward, CraftingMode, crafting
from casemate.errors import UserError
from casemate.fields import Count, Flag, Positive, Unit, spec
from casemate.networks.base import Classifier
from casemate.trainable import Context, Task, Update

UNDERFLOW = 1e-6  # what the published code adds to a sum of exponentials before it takes the logarithm


@spec
class FeatureScattering(AscentSchedule, CraftingMode, CleanForward, Defense):
    """Minimise soft CE(f(x_adv)), x_adv from K steps up the transport cost between codes of x and of x_adv.

    The step starts at a uniform point of the ball, not cut to [0, 1], and codes are read in the mode of crafting.
    K + 2 forward passes, K input gradients and one weight gradient per batch. Its robustness to weak attacks is
    partly masking by the smoothed labels: the gap between PGD and AutoAttack is known to be large.
    """

    batch_coupled: ClassVar[bool] = True
    capturable: ClassVar[bool] = False  # the stopping rule of Sinkhorn's iteration reads a number

    steps: Count = 1
    step_factor: Positive = 1.0
    smoothing: Unit = 0.5
    """The true class has target 1 - smoothing, the others share the rest."""
    ot_on: Literal["logits", "features"] = "logits"
    """The codes: logits, as in the code, or the penultimate features, as in the paper."""
    ot_solver: Literal["sinkhorn", "ipot"] = "sinkhorn"
    """Sinkhorn's iteration as published, stopped early by `ot_tolerance`; or the proximal points of Xie et al.
    (2020), always `ot_iterations` of them, which come to the unregularised plan."""
    ot_regularisation: Positive = 0.01
    """Weight of the plan's entropy; of the proximal term with "ipot"."""
    ot_iterations: Count = 100
    ot_tolerance: Positive = 0.1
    """Sinkhorn stops once one iteration moves the row potentials by less than this, all taken together. At 0.1
    that is after a few: the columns of the plan have their mass, its rows only nearly."""
    ot_detach_plan: Flag = False
    """True takes the plan as a constant; the published gradient runs through the iterations, too."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        most = 1 - 1 / task.num_classes
        if self.smoothing > most:
            raise UserError(
                f"feature_scattering: with {task.num_classes} classes, smoothing {self.smoothing:g} makes the true "
                f"class less likely than the others; at most {most:g}"
            )
        return super().modules(task)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = cast(Classifier, ctx.modules["classifier"])
        ascent = self.ascent(ctx.threat, ctx.fraction)

        def codes(images: Tensor) -> Tensor:
            with ctx.autocast():
                return (classifier(images) if self.ot_on == "logits" else classifier.features(images)).float()

        def cost(at: Tensor) -> Tensor:
            value = self.transport_cost(clean, codes(at))
            ctx.log(transport=value)
            return value

        start = ascent.start(x, ctx.rng, "uniform")
        with crafting(classifier, bn=self.bn_mode_attack):
            with torch.no_grad():
                clean = codes(x)
            x_adv = ascent(cost, x, start)

        def loss() -> Tensor:
            logits = classifier(x_adv).float()
            classes = logits.shape[1]
            # cross_entropy spreads its share over all classes; here the true one gets none of it.
            return F.cross_entropy(logits, y, label_smoothing=self.smoothing * classes / (classes - 1))

        yield Update(("classifier",), loss)
        self.look_at_clean(ctx, x, y)

    def transport_cost(self, clean: Tensor, perturbed: Tensor) -> Tensor:
        """sum(T C), the cost of carrying `clean` codes (B x d) to `perturbed` ones by the plan T; a scalar."""
        cost = cosine_cost(clean, perturbed)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.ot_detach_plan):
            if self.ot_solver == "sinkhorn":
                plan = sinkhorn(cost, self.ot_regularisation, self.ot_iterations, self.ot_tolerance)
            else:
                plan = proximal_points(cost, self.ot_regularisation, self.ot_iterations)
        return (plan * cost).sum()


def cosine_cost(a: Tensor, b: Tensor) -> Tensor:
    """max(0, 1 - cos(a_i, b_j)) of rows (A x d and B x d): A x B, in [0, 2]."""
    return (1 - F.normalize(a, eps=1e-6) @ F.normalize(b, eps=1e-6).T).clamp_min(0)


def sinkhorn(cost: Tensor, regularisation: float, iterations: int, tolerance: float) -> Tensor:
    """The plan (A x B) of entropic optimal transport between uniform marginals, differentiable (Cuturi 2013).

    Potentials start at 0, rows are fitted before columns, and it stops when the row potentials move by less than
    `tolerance` in sum. So the columns are exact (up to `UNDERFLOW`), and the rows as good as the tolerance.
    """
    rows, columns = cost.shape
    u, v = cost.new_zeros(rows), cost.new_zeros(columns)

    def log_plan() -> Tensor:
        return (u[:, None] + v - cost) / regularisation

    for _ in range(iterations):
        before = u
        u = u - regularisation * ((log_plan().exp().sum(1) + UNDERFLOW).log() + math.log(rows))
        v = v - regularisation * ((log_plan().exp().sum(0) + UNDERFLOW).log() + math.log(columns))
        if float((u - before).detach().abs().sum()) < tolerance:
            break
    return log_plan().exp()


def proximal_points(cost: Tensor, weight: float, iterations: int) -> Tensor:
    """The plan (A x B) of optimal transport between uniform marginals by IPOT (Xie et al. 2020), differentiable.

    Each iteration is one Sinkhorn step of the problem regularised by the divergence to the plan before it, so the
    entropy that blurs the plan goes away; `weight` sets the speed, not the result.
    """
    rows, columns = cost.shape
    kernel = (-cost / weight).exp()
    plan, right = torch.ones_like(cost), cost.new_full((columns,), 1 / columns)
    for _ in range(iterations):
        scaled = kernel * plan
        left = 1 / (rows * (scaled @ right)).clamp_min(torch.finfo(cost.dtype).tiny)
        right = 1 / (columns * (scaled.T @ left)).clamp_min(torch.finfo(cost.dtype).tiny)
        plan = left[:, None] * scaled * right
    return plan
