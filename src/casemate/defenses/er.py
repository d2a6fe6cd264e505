"""ER-Classifier (Li et al.): classification in a small embedding whose distribution is held near a Gaussian.

min over Q, C of CE(C(Q(x)), y) + lambda W1(Q(x), N(0, I)), on clean images and, with `min_max`, on adversarial ones;
without it this is ER-Classifier-. Inference is C(Q(x)) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.defenses.crafting import AscentSchedule, CraftingMode, crafting
from casemate.defenses.embedding import MatchedPrior, apart, normal, require_batch
from casemate.fields import Count, Flag, Positive, Unit, spec
from casemate.networks.base import Classifier
from casemate.objectives import cross_entropy
from casemate.threat import untargeted
from casemate.trainable import Context, Update


@spec
class ER(AscentSchedule, CraftingMode, MatchedPrior):
    """The defaults are MNIST's at radius 0.3: 40 steps of 0.01. CIFAR-10 at 0.03 has 20 of 0.01, STL10 20 of 0.0078.

    Passes per batch of K steps, "joint": K + 2 forwards, K input gradients, 2 weight gradients (one of each without
    `min_max`); "separate": K + 4, K and 4 (two of each); "compat_official": K + 5, K and 4 (two of each). The
    authors' code repeats some of these forwards.
    """

    steps: Count = 40
    step_factor: Positive = 1.3333333333333333
    min_max: Flag = True
    """Off is ER-Classifier-: no adversarial image anywhere."""
    delay: Unit = 0.0
    """Share of the budget before adversarial images are used."""
    ce_on: Literal["avg", "adv_only"] = "avg"
    """What the cross-entropy is of: the mean of clean and adversarial (code), or adversarial alone (paper)."""
    pgd_labels: Literal["true", "predicted"] | None = None
    """The labels that crafting moves away from; by default "true", and "predicted" in "compat_official"."""
    rule: Literal["joint", "separate", "compat_official"] = "joint"
    """One step of Q and C on the whole loss; or, as in the paper's algorithm, one on the cross-entropy and a step of
    its own for Q on the regulariser, whose weight then counts for nothing under Adam; or the authors' sequence of
    steps on gradients that add up, and their test routine's side effect, which leaves BatchNorm and dropout in eval
    mode after the first epoch."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        classifier = cast(Classifier, ctx.modules["classifier"])
        if self.rule == "compat_official" and ctx.epoch > 0:
            classifier.eval()
        images = [x]
        if self.min_max and ctx.fraction >= self.delay:
            images.append(self.crafted(ctx, x, y))

        def entropy(codes: Sequence[Tensor]) -> Tensor:
            counted = codes[-1:] if self.ce_on == "adv_only" else codes
            each = [F.cross_entropy(classifier.head(z).float(), y) for z in counted]
            return torch.stack(each).mean()

        if self.rule == "compat_official":
            yield from self.official(ctx, images, entropy)
        else:
            yield from self.matched(ctx, images, entropy, separate=self.rule == "separate")

    def official(
        self, ctx: Context, images: Sequence[Tensor], entropy: Callable[[list[Tensor]], Tensor]
    ) -> Iterator[Update]:
        """The steps of the authors' code: D on clean, then also on adversarial codes; Q and C on the cross-entropy;
        Q on the regulariser of clean, then also of adversarial codes. D's and Q's gradients add up.

        Adam does not feel the scale of its gradient: added to that of the cross-entropy, the regulariser's weight
        means something; in a step of its own it would not.
        """
        classifier, critic = cast(Classifier, ctx.modules["classifier"]), ctx.modules["critic"]
        require_batch(classifier, images[0])
        prior = [normal(ctx, len(batch), critic) for batch in images]
        codes: list[Tensor] = []

        def critic_loss(at: int) -> Tensor:
            if at == 0:
                codes.extend(classifier.features(batch).float() for batch in images)
            return apart(ctx, critic, prior[at], codes[at].detach())

        def named() -> Tensor:
            value = entropy(codes)
            ctx.log(entropy=value)
            return value

        def aligned(at: int) -> Tensor:
            value: Tensor = critic(classifier.features(images[at]).float()).float().mean()
            ctx.log(aligned=value)
            return self.regulariser * value

        for at in range(len(images)):
            yield Update(("critic",), partial(critic_loss, at), zero_grad=at == 0)
        yield Update(("encoder", "head"), named)
        for at in range(len(images)):
            yield Update(("encoder",), partial(aligned, at), zero_grad=False)

    def crafted(self, ctx: Context, x: Tensor, y: Tensor) -> Tensor:
        """PGD on the cross-entropy, from a uniform start that is not cut to [0, 1]."""
        classifier, ascent = ctx.modules["classifier"], self.ascent(ctx.threat, ctx.fraction)
        labels = self.pgd_labels or ("predicted" if self.rule == "compat_official" else "true")
        with crafting(classifier, bn=self.bn_mode_attack), ctx.autocast():
            require_batch(classifier, x)
            if labels == "predicted":
                with torch.no_grad():
                    y = classifier(x).argmax(1)
            goal = untargeted(y)
            start = ascent.start(x, ctx.rng, "uniform")
            x_adv = ascent(lambda at: cross_entropy(classifier(at).float(), goal), x, start)
        return x_adv
