"""Inference-time manifold transformation (IMT) of ATLD (Qian et al. 2021, section "Inference with manifold
transformation"): every input is moved a step towards what the critic calls clean, then classified.

The move is up to the radius around the *attacked* image, so the image classified may be two radii from the clean one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from casemate.networks.base import Classifier
from casemate.networks.critics import Critic, Latent, read_codes
from casemate.system import frozen

Rule = Literal["full", "interval"]


class IMT:
    """x -> clip(x + m eps sign(grad_x z(x))), z being the critic's logit of "clean" on the classifier's code.

    The published step descends BCE(sigmoid(z), 1), whose gradient is that of -z times a positive number: the sign
    is the same, and z does not vanish when the critic saturates. `rule` "full" has m = 1; "interval" (ATLD+, the
    limited form) has m = 1/2 where the first score lies strictly inside `band`. With more than one step, each
    moves `step` x m eps, within m eps of the input. Runs in eval mode whatever the modules' mode; deterministic.
    """

    def __init__(
        self, classifier: Classifier, critic: Critic, *, radius: float, rule: Rule = "full",
        band: tuple[float, float] = (0.3, 0.7), steps: int = 1, step: float = 1.0, latent: Latent = "logits",
    ) -> None:  # fmt: skip
        self.classifier, self.critic = classifier, critic
        self.radius, self.rule, self.band, self.steps, self.step, self.latent = (
            radius,
            rule,
            band,
            steps,
            step,
            latent,
        )
        self.passes = (steps, steps)

    def readout(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z (N,), logits N x classes) of images as they are, differentiable: what an export traces."""
        logits, codes = read_codes(self.classifier, x, self.latent)
        z, _ = self.critic(codes)
        return z, logits

    def strength(self, z: Tensor) -> Tensor:
        """m (N,) from the first z: 1, or 1/2 where the interval rule halves the step."""
        if self.rule == "full":
            return torch.ones_like(z)
        score = z.sigmoid()
        return 1 - 0.5 * ((score > self.band[0]) & (score < self.band[1])).to(z.dtype)

    def move(self, at: Tensor, gradient: Tensor, x: Tensor, reach: Tensor) -> Tensor:
        """One step from `at` up `gradient`, within `reach` (N x 1 x 1 x 1, pixels) of `x`, then within [0, 1]."""
        moved = at + self.step * reach * gradient.sign()
        return torch.minimum(torch.maximum(moved, x - reach), x + reach).clamp(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Purified images, like `x` (N x C x H x W in [0, 1]), without a gradient. Callable under no_grad, too."""
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.classifier, self.critic):
            x = at = x.detach().clone()
            reach = torch.zeros(())
            for number in range(self.steps):
                at = at.detach().requires_grad_()
                z, _ = self.readout(at)
                # Samples are independent in eval mode: the gradient of the sum is every sample's own.
                (gradient,) = torch.autograd.grad(z.sum(), at)
                if number == 0:
                    reach = (self.radius * self.strength(z.detach())).view(-1, 1, 1, 1)
                at = self.move(at.detach(), gradient, x, reach)
        return at

    def score(self, x: Tensor) -> Tensor:
        """(N,) in [0, 1]: the critic's probability that `x` is clean."""
        with torch.no_grad(), frozen(self.classifier, self.critic):
            return self.readout(x)[0].sigmoid()

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies it besides the critic's weights."""
        return {
            "purification": "imt", "radius": self.radius, "rule": self.rule, "band": list(self.band),
            "steps": self.steps, "step": self.step, "latent": self.latent,
        }  # fmt: skip

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The critic."""
        return [self.critic]
