"""ADT-IMP-AM (Dong et al. 2020, section 3.3): a generator turns noise into perturbations, an encoder reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from casemate.attacks.amortised import ImpAMTrainer
from casemate.attacks.distributions import posterior_surprisal
from casemate.defenses.crafting import crafting
from casemate.defenses.distributional import AmortisedDefense, opposed
from casemate.fields import spec
from casemate.threat import untargeted
from casemate.trainable import Context, Update


@spec
class ADTIMPAM(AmortisedDefense, ImpAMTrainer):
    """One backward pass of loss + `entropy` x max(U - `threshold`, 0) on one draw, U being the encoder's surprisal of
    the noise per number: the classifier descends the loss, the generator climbs it by a reversal of the gradient at
    x_adv, and generator and encoder lower U.

    Three forward passes of the classifier, two input gradients and one weight gradient per batch, one forward and
    one weight gradient of generator and encoder; "trades" adds a forward pass and a weight gradient.
    """

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        threat = self.threat(ctx)
        with crafting(ctx.modules["classifier"], bn=self.bn_mode_attack):
            seen = self.observe(replace(ctx, threat=threat), x, untargeted(y))
        z = self.noise(x.shape, ctx.rng).to(x)

        def loss() -> Tensor:
            pattern = self.pattern(ctx.modules, seen, z)
            surprisal = posterior_surprisal(z, *ctx.modules["encoder"](pattern)).mean()
            ctx.log(surprisal=surprisal)
            pressed = surprisal if self.threshold is None else F.relu(surprisal - self.threshold)
            x_adv = (x + threat.radius * pattern).clamp(0.0, 1.0)
            return self.outer(ctx, x, opposed(x_adv), y, self.entropy * pressed)

        yield Update(("classifier", "generator", "encoder"), loss)

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:
        """Logs `spread`, the standard deviation over noise of the perturbation over the radius."""
        with crafting(ctx.modules["classifier"]):
            super().epoch_end(ctx, validate)
