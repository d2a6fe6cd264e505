"""ADT-EXP (Dong et al. 2020, section 3.1): training on explicit adversarial distributions, one searched per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.attacks.distributions import TanhGaussian
from casemate.attacks.explicit import Accumulated, distribution
from casemate.attacks.optimizers import Adam
from casemate.defenses.adversary import Ramped, require_norm
from casemate.defenses.base import Defense
from casemate.defenses.crafting import CraftingMode, crafting
from casemate.defenses.distributional import OuterLoss
from casemate.defenses.trades import divergence
from casemate.fields import Count, Flag, NonNegative, Positive, spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Task, Update


@spec
class ADTEXP(Ramped, OuterLoss, CraftingMode, Defense):
    """delta = radius x tanh(mu + sigma r): raise E[loss] + `entropy` x H over every pixel's mu and sigma, then
    descend the loss on one fresh draw, which is all that the running statistics see.

    The `samples` draws of a step are one batch: `steps` x `samples` + 1 forward passes, `steps` x `samples` input
    gradients and one weight gradient, counted in batches of the training size; "trades" adds two forward passes
    (clean probabilities before the search, clean logits in the loss) and a weight gradient.
    """

    steps: Count = 7
    samples: Count = 5
    """Draws per step."""
    search_lr: Positive = 0.3
    """Of the search's Adam with betas (0, 0): a step moves every mu and rho, sigma = softplus(rho), by this much."""
    entropy: NonNegative = 0.01
    """Weight of the entropy."""
    entropy_over: Literal["mean", "sum"] = "mean"
    """Per pixel as in the authors' code, or of the whole image as in the paper, where this weight rules the loss."""
    accumulate: Flag = True
    """Steps follow the sum of all gradients so far, as in the authors' code, which never clears them."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        require_norm("adt_exp", frozenset({"linf"}), task.threat)
        return super().modules(task)

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        threat = self.threat(ctx)
        with crafting(ctx.modules["classifier"], bn=self.bn_mode_attack), ctx.autocast():
            found = self.search(self.raised(ctx.modules["classifier"], x, y), x, threat, ctx.rng)
        ctx.log(sigma=F.softplus(found.rho).mean())
        x_adv = found.perturb(x, torch.randn(x.shape, generator=ctx.rng).to(x))
        yield Update(("classifier",), lambda: self.outer(ctx, x, x_adv, y))

    def raised(self, classifier: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """What the search raises: values (samples N,) at images (samples N) x C x H x W."""
        if self.loss == "ce":
            labels = y.repeat(self.samples)
            return lambda at: F.cross_entropy(classifier(at).float(), labels, reduction="none")
        with torch.no_grad():
            clean = classifier(x).float().log_softmax(1).repeat(self.samples, 1)
        return lambda at: divergence(clean, classifier(at).float().log_softmax(1))

    def search(
        self, raised: Callable[[Tensor], Tensor], x: Tensor, threat: ThreatModel, rng: torch.Generator
    ) -> TanhGaussian:
        """The distributions after all steps, from mu = 0 and rho = 0. Labels enter by `raised` alone."""
        variables = x.new_zeros(len(x), 2, *x.shape[1:])
        adam = Adam(self.search_lr, betas=(0.0, 0.0))
        state = (Accumulated(adam) if self.accumulate else adam).begin(variables)
        for _ in range(self.steps):
            noise = torch.randn(self.samples, *x.shape, generator=rng).to(x)
            with torch.enable_grad():
                variables.requires_grad_()
                here = distribution(variables, threat)
                values = raised(here.perturb(x, noise).flatten(0, 1)).view(self.samples, -1)
                surprisal = here.surprisal(noise).flatten(2)
                entropy = surprisal.mean(2) if self.entropy_over == "mean" else surprisal.sum(2)
                loss = -(values + self.entropy * entropy).mean(0)
                (gradient,) = torch.autograd.grad(loss.sum(), variables)
            variables = state.step(variables.detach(), loss.detach(), gradient)
        return distribution(variables, threat)
