"""Adversarial training on projected gradient ascent (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, crafting
from casemate.fields import spec
from casemate.objectives import objective
from casemate.threat import untargeted
from casemate.trainable import Context, Update


@spec
class ATPGD(AscentSchedule, Defense):
    """Minimise CE(f(x_adv), y), x_adv from K ascent steps on `objective` from a uniform start cut to [0, 1].

    K + 1 forward passes, K input gradients and one weight gradient per batch. `bn_mode_attack` is the mode of
    the classifier while crafting: "train_update" is what Madry and Rice run, "eval" what most later code does.
    """

    objective: Literal["ce", "margin"] = "ce"
    bn_mode_attack: Literal["eval", "train", "train_update"] = "eval"

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = ctx.modules["classifier"]
        ascent = self.ascent(ctx.threat, ctx.fraction)
        maximised, goal = objective(self.objective), untargeted(y)

        start = ascent.threat.random_start(x, ctx.rng).clamp(0, 1)
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = ascent(lambda at: maximised(classifier(at).float(), goal), x, start)

        yield Update(("classifier",), lambda: F.cross_entropy(classifier(x_adv).float(), y))
