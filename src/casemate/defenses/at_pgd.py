"""Adversarial training on projected gradient ascent (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CraftingMode, clean_accuracy, crafting, predicted
from casemate.fields import Flag, spec
from casemate.objectives import objective
from casemate.threat import untargeted
from casemate.trainable import Context, Update


@spec
class ATPGD(AscentSchedule, CraftingMode, Defense):
    """Minimise CE(f(x_adv), y), x_adv from K ascent steps on `objective` from a random start.

    K + 1 forward passes, K input gradients and one weight gradient per batch. `bn_mode_attack` is the mode of
    the classifier while crafting: "train_update" is what Madry and Rice run, "eval" what most later code does.
    Early-stopped AT (Rice et al. 2020) is this with the recipe's `select: best`.
    """

    objective: Literal["ce", "margin"] = "ce"
    attack_labels: Literal["true", "predicted"] = "true"
    """"predicted" moves away from the current prediction, as the ER-Classifier's baseline does; one forward more."""
    start: Literal["clipped", "uniform", "gaussian"] = "clipped"
    """Uniform in the ball and cut to [0, 1] (Madry, Rice, Wong), or not cut (the code of Feature Scattering, ATLD and
    ER, and ADT's evaluation); or 0.001 N(0, I) from the image (L2L's baseline)."""
    clean_forward: Flag = False
    """One more forward pass, of the clean batch in train mode after the update, as in Rice's code: it is logged as
    `train_clean`, and the running statistics see clean images through it."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)
        maximised = objective(self.objective)

        start = ascent.start(x, ctx.rng, self.start)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            goal = untargeted(y if self.attack_labels == "true" else predicted(classifier, x))
            x_adv = ascent(lambda at: maximised(classifier(at).float(), goal), x, start)

        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x_adv).float(), y))

        if self.clean_forward:
            clean_accuracy(ctx, x, y)
