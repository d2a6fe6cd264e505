"""Adversarial training on the margin of Carlini & Wagner (2017): the "C&W" rows of the papers' tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.base import Cost
from casemate.attacks.carlini_wagner import CWAdam
from casemate.defenses.base import Defense
from casemate.defenses.crafting import Ascent, AscentSchedule, CraftingMode, crafting
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.objectives import capped_margin
from casemate.system import ANSWERS, View
from casemate.threat import untargeted
from casemate.trainable import Context, Task, Update


@spec
class ATCW(AscentSchedule, CraftingMode, Defense):
    """Minimise CE(f(x_adv), y) on images that raise the margin max_{j != y} z_j - z_y.

    K + 1 forward passes, K input gradients and one weight gradient per batch, in both modes.
    """

    mode: Literal["pgd_margin", "minnorm"] = "pgd_margin"
    """"pgd_margin" is AT-PGD with this loss. "minnorm" is what L2L-DA's C&W row presumably was: steps of Adam from
    x itself, which end near the decision boundary and so teach little."""
    steps: Count | None = None  # type: ignore[assignment]
    """Without it 10 for "pgd_margin" and 100 for "minnorm"."""
    kappa: NonNegative | None = None
    """Margin at which the loss stops counting; 50 for "pgd_margin", where it is never met, and 0 for "minnorm"."""
    minnorm_rate: Positive = 0.001
    """Adam's rate of "minnorm", in pixel units."""
    minnorm_tau: NonNegative = 0.03137254901960784
    """Distance from which "minnorm" pays for itself: 8/255 on every data set, MNIST at 0.3 included."""

    @property
    def first_steps(self) -> int:
        return self.steps or (100 if self.mode == "minnorm" else 10)

    def modules(self, task: Task) -> dict[str, nn.Module]:
        if self.mode == "minnorm" and task.threat.norm != "linf":
            raise UserError(f"at_cw mode minnorm needs an linf threat model, not {task.threat}; use mode: pgd_margin")
        return super().modules(task)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)

        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            if self.mode == "pgd_margin":
                margin, goal = capped_margin(50.0 if self.kappa is None else self.kappa), untargeted(y)
                start = ascent.start(x, ctx.rng)
                x_adv = ascent(lambda at: margin(classifier(at).float(), goal), x, start)
            else:
                x_adv = self.minimum_norm(classifier, ascent, x, y)

        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x_adv).float(), y))

    def minimum_norm(self, classifier: nn.Module, ascent: Ascent, x: Tensor, y: Tensor) -> Tensor:
        """The last iterate of Adam on max(|x_adv - x|_inf - tau, 0) + max(kappa - margin, 0), kept in the ball."""
        search = CWAdam(
            steps=ascent.steps, rate=self.minnorm_rate, kappa=self.kappa or 0.0, tau=self.minnorm_tau,
            weighted=False, keep="last",
        )  # fmt: skip
        view = View("training", lambda at: classifier(at).float(), True, ANSWERS)
        return search.run(view, x, untargeted(y), ascent.threat, seed=0, cost=Cost.zero(len(x)))
