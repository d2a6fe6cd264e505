"""Triplet loss adversarial training (Mao et al. 2019): adversarial features are held near their own class.

Beside the image x, its adversarial x' and the label there are a positive, another image of the same class, and a
negative: the image of another class, out of a dictionary, whose feature is nearest. Training follows the authors'
code (columbia/Metric_Learning_Adversarial_Robustness).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.defenses.crafting import AscentSchedule, CraftingMode, crafting
from casemate.errors import UserError
from casemate.fields import Count, Flag, NonNegative, Positive, Unit, spec
from casemate.networks.base import Classifier
from casemate.objectives import cross_entropy
from casemate.threat import ThreatModel, untargeted
from casemate.trainable import Context, Task, Update

MARGINS = {"cosine": 0.03, "l2": 1.0, "kl": 5.0}
IMAGES, LABELS, FEATURES = "tla_images", "tla_labels", "tla_features"


@spec
class TLA(AscentSchedule, CraftingMode, Defense):
    """Minimise CE(f(x')) + weight [T(x', x, n) + T(x', p, n)] + feature_matching |h(x) - h(x')|_2^2.

    T(a, p, n) = mean max(0, d(a, p) - d(a, n) + margin) + norm_weight mean(a^2 + p^2 + n^2), on penultimate features
    h. x' is K steps of ascent on the cross-entropy, and n is sought in eval mode; then x', x, p and n each have a
    forward pass in train mode, with statistics of their own. K + 1 + dictionary + 4 forward passes, K input
    gradients and four weight gradients per batch.
    """

    steps: Count = 7
    step_factor: Positive = 1.75
    weight: NonNegative = 2.0
    distance: Literal["cosine", "l2", "kl"] = "cosine"
    """d(u, v): 1 - |cos|, |u - v|_2, or KL(p || q) + KL(q || p) of softmaxed features."""
    abs_cos: Flag = True
    """False is 1 - cos: opposite features are then far apart."""
    margin: NonNegative | None = None
    """Of T(x', p, n). Without it 0.03, 1 and 5 for the three distances."""
    clean_margin: NonNegative | None = None
    """Of T(x', x, n). Without it `margin`."""
    use_clean: Flag = True
    """T(x', x, n); off for the published MNIST run."""
    use_positive: Flag = True
    """T(x', p, n)."""
    clean_noise: Flag = True
    """x is seen with uniform noise of the radius, rounded to grey levels, as published."""
    norm_weight: NonNegative = 0.001
    feature_matching: NonNegative = 0.0
    smoothing: Unit = 0.0
    """Of the labels, towards the uniform distribution over all classes."""
    negative: Literal["hard", "random"] = "hard"
    """ "random" is TLA-RN: a batch drawn without a look at labels, and no dictionary."""
    dictionary: Count = 10
    """Size in batches. A small network wants a smaller one: the nearest of many is too hard."""
    reuse_dictionary: Count = 1
    """Steps that share one dictionary and the features it had when it was drawn."""
    switch_anchor: Flag = False
    """TLA-SA: the clean image is the anchor and x' its positive; negatives are sought near the clean image."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        if not (self.use_clean or self.use_positive):
            raise UserError("tla without use_clean and use_positive has no triplet: use at_pgd")
        return super().modules(task)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        f = cast(Classifier, ctx.modules["classifier"])
        ascent = self.ascent(ctx.threat, ctx.fraction)

        start = ascent.start(x, ctx.rng)
        clean = self.noised(x, ascent.threat, ctx.rng)
        with crafting(f, bn=self.bn_mode_attack), ctx.autocast():
            x_adv = ascent(lambda at: cross_entropy(f(at).float(), untargeted(y)), x, start)
        with crafting(f):
            negative, found = self.negatives(ctx, f, clean if self.switch_anchor else x_adv, y)
        images = {"adversarial": x_adv, "negative": negative}
        if self.use_positive:
            images["positive"] = ctx.draw(len(x), y)[0]
        if self.use_clean or self.switch_anchor or self.feature_matching:
            images["clean"] = clean
        anchor, twin = ("clean", "adversarial") if self.switch_anchor else ("adversarial", "clean")
        pairs = [(twin, self._clean_margin)] if self.use_clean else []
        pairs += [("positive", self._margin)] if self.use_positive else []

        def loss() -> Tensor:
            h = {name: f.features(seen).float() for name, seen in images.items()}  # each with its own statistics
            entropy = F.cross_entropy(f.head(h["adversarial"]).float(), y, label_smoothing=self.smoothing)
            terms = [self.triplet(h[anchor], h[near], h["negative"], found, margin) for near, margin in pairs]
            triplets = torch.stack(terms).sum()
            ctx.log(entropy=entropy, triplets=triplets)
            total = entropy + self.weight * triplets
            if self.feature_matching:
                total = total + self.feature_matching * (h["clean"] - h["adversarial"]).square().sum(1).mean()
            return total

        yield Update(("classifier",), loss)

    # --- the triplet --------------------------------------------------------------------------------------------

    @property
    def _margin(self) -> float:
        return MARGINS[self.distance] if self.margin is None else self.margin

    @property
    def _clean_margin(self) -> float:
        return self._margin if self.clean_margin is None else self.clean_margin

    def triplet(self, anchor: Tensor, positive: Tensor, negative: Tensor, found: Tensor, margin: float) -> Tensor:
        """T of features N x d; the hinge counts where `found` (N,) says that the negative is one."""
        hinge = F.relu(self.apart(anchor, positive) - self.apart(anchor, negative) + margin)
        norms = anchor.square().mean() + positive.square().mean() + negative.square().mean()
        return (hinge * found).mean() + self.norm_weight * norms

    def apart(self, u: Tensor, v: Tensor) -> Tensor:
        """d(u, v) of features N x d, (N,)."""
        if self.distance == "cosine":
            cosine = (unit(u) * unit(v)).sum(1)
            return 1 - (cosine.abs() if self.abs_cos else cosine)
        if self.distance == "l2":
            return ((u - v).square().sum(1) + 1e-20).sqrt()
        log_p, log_q = u.log_softmax(1), v.log_softmax(1)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)

    # --- its images ---------------------------------------------------------------------------------------------

    def noised(self, x: Tensor, threat: ThreatModel, rng: torch.Generator) -> Tensor:
        """The clean image as it is seen in training, in [0, 1]."""
        return threat.random_start(x, rng).mul(255).round().div(255).clamp(0, 1) if self.clean_noise else x

    def negatives(self, ctx: Context, f: Classifier, anchor: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(images of other classes, whether there was one (N,)): those whose features have the largest cosine."""
        if self.negative == "random":
            return ctx.draw(len(anchor))[0], torch.ones(len(anchor), device=anchor.device)
        with torch.no_grad():
            with ctx.autocast():
                images, labels, features = self.drawn_dictionary(ctx, f, self.dictionary * len(anchor))
                wanted = f.features(anchor).float()
            # In float32: in half precision the nearest few would all have the same cosine.
            similarity = unit(wanted) @ unit(features).T
        # Minus infinity, not the published 0: that would win over images of other classes that point away.
        similarity = similarity.masked_fill(y[:, None] == labels, -torch.inf)
        return images[similarity.argmax(1)], similarity.isfinite().any(1).float()

    def drawn_dictionary(self, ctx: Context, f: Classifier, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(images, labels (D,), features D x d in eval mode): fresh, or the one that steps share."""
        kept = ctx.state
        if ctx.step % self.reuse_dictionary == 0 or IMAGES not in kept:
            images, labels = ctx.draw(size)
            features = f.features(images).float()
            if self.reuse_dictionary == 1:
                return images, labels, features
            kept.update({IMAGES: images, LABELS: labels, FEATURES: features})
        return kept[IMAGES], kept[LABELS], kept[FEATURES]


def unit(features: Tensor) -> Tensor:
    """Rows of N x d scaled to length 1; the zero row stays zero, and has a gradient."""
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt()
