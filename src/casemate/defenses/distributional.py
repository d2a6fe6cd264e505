"""Adversarial distributional training (Dong et al. 2020): what its three forms have in common.

min over theta of the mean over images of max over p of E_{delta ~ p}[loss(f(x + delta))] + entropy weight x H(p), p a
distribution on the linf ball. H does not depend on theta, so the classifier descends the loss on a draw.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.amortised import Amortised
from casemate.defenses.adversary import AdversaryDefense
from casemate.defenses.crafting import CraftingMode
from casemate.defenses.trades import divergence
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.trainable import Context, Player, Task


@spec
class OuterLoss:
    """Both losses of the paper's classifiers."""

    loss: Literal["ce", "trades"] = "ce"
    """"ce" is CE(f(x + delta), y); "trades" CE(f(x), y) + `beta` KL(p(x) || p(x + delta)), whose divergence is then
    also what the adversary raises."""
    beta: NonNegative = 6.0
    """Of "trades"; 1 and 6 in the paper."""

    def outer(self, ctx: Context, x: Tensor, x_adv: Tensor, y: Tensor, regulariser: Tensor | float = 0.0) -> Tensor:
        """The classifier's loss, one train-mode forward pass of `x_adv`, and one of `x` before it for "trades".

        `regulariser` is what an adversary in the same update minimises beside minus the loss; "trades" weighs it by
        `beta` as well, so that beta does not move the adversary's balance.
        """
        classifier = ctx.modules["classifier"]
        if self.loss == "ce":
            robust = F.cross_entropy(classifier(x_adv).float(), y)
            ctx.log(robust=robust)
            return robust + regulariser
        logits = classifier(x).float()
        natural = F.cross_entropy(logits, y)
        robust = divergence(logits.log_softmax(1), classifier(x_adv).float().log_softmax(1)).mean()
        ctx.log(natural=natural, robust=robust)
        return natural + self.beta * (robust + regulariser)


@spec
class AmortisedDefense(OuterLoss, CraftingMode, AdversaryDefense, Amortised):
    """The two forms with a generator, which sees the image and the gradients of the CE at it and at its FGSM point,
    taken from the classifier in the mode of crafting: two forward passes and two input gradients."""

    width: Count = 256
    """Channels of the generator's first layer, as published: 10.3 M parameters (explicit) and 10.6 M (implicit). 32
    suits a small machine."""
    gradient_input: Literal["batch", "batch64", "maxabs", "frobenius", "rms"] = "batch64"
    """How input gradients are scaled: as the authors' batch mean, over the batch at hand or always over 64 images,
    which leaves the generator all but blind to them at the start; or each image's to a largest entry, an l2 norm or a
    root mean square of 1."""
    generator_lr: Positive = 0.0002
    """Of Adam, constant, for the generator (betas 0.5 and 0.999) and the encoder."""

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """The recipe's optimizer for the classifier; Adam at a constant rate for the adversary."""
        found = {"classifier": task.player(modules["classifier"].parameters())}
        for name, betas in (("generator", (0.5, 0.999)), ("encoder", (0.9, 0.999))):
            if name in modules:
                own = list(modules[name].parameters())
                found[name] = Player(own, torch.optim.Adam(own, lr=self.generator_lr, betas=betas))
        return found


def opposed(x_adv: Tensor) -> Tensor:
    """`x_adv` bit for bit, with the opposite gradient: one backward pass descends the loss in the classifier and
    climbs it in what made `x_adv`."""
    return 2 * x_adv.detach() - x_adv
