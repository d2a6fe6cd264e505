"""ADT-EXP-AM (Dong et al. 2020, section 3.2): a generator gives each image's explicit distribution at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from casemate.attacks.amortised import ExpAMTrainer
from casemate.defenses.crafting import crafting
from casemate.defenses.distributional import AmortisedDefense, opposed
from casemate.fields import spec
from casemate.threat import untargeted
from casemate.trainable import Context, Update


@spec
class ADTEXPAM(AmortisedDefense, ExpAMTrainer):
    """One backward pass of loss - `entropy` x H on one draw: the classifier descends the loss, the generator climbs
    loss + `entropy` x H by a reversal of the gradient at x_adv.

    Three forward passes of the classifier, two input gradients and one weight gradient per batch, one forward and
    one weight gradient of the generator; "trades" adds a forward pass and a weight gradient. The cut to [0, 1] comes
    before the reversal, as in the authors' code: saturated pixels teach the generator nothing but entropy.
    """

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        threat = self.threat(ctx)
        with crafting(ctx.modules["classifier"], bn=self.bn_mode_attack):
            seen = self.observe(replace(ctx, threat=threat), x, untargeted(y))
        noise = self.noise(x.shape, ctx.rng).to(x)

        def loss() -> Tensor:
            found = self.distribution(ctx.modules, seen, threat)
            surprisal = found.surprisal(noise).flatten(1)
            entropy = (surprisal.mean(1) if self.entropy_over == "mean" else surprisal.sum(1)).mean()
            ctx.log(entropy=entropy)
            return self.outer(ctx, x, opposed(found.perturb(x, noise)), y, -self.entropy * entropy)

        yield Update(("classifier", "generator"), loss)
