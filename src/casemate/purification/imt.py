"""Inference-time manifold transformation (IMT) of ATLD (Qian et al. 2021, section "Inference with manifold
transformation"): every input is moved a step towards what the critic calls clean, then classified.

The move is up to the radius around the *attacked* image, so the image classified may be two radii from the clean one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from casemate.networks.base import Classifier
from casemate.networks.critics import Critic, Latent, read_codes
from casemate.system import Offer, Purification, View, frozen, identity_backward, noise_averaged

Rule = Literal["full", "interval"]


@dataclass(frozen=True)
class Walk:
    """One purification: the purified images, and of each step the gradient of z that it followed. `z` (N,) is the
    first step's, `reach` N x 1 x 1 x 1 in pixels."""

    purified: Tensor
    z: Tensor
    gradients: tuple[Tensor, ...]
    reach: Tensor


class IMT(Purification):
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
        parts: tuple[Offer, ...] = ("purification", "critic", "band")
        self.offers = frozenset(parts if rule == "interval" else parts[:2])

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

    def walk(self, x: Tensor) -> Walk:
        """The purification of `x`, with what it saw on the way; no tensor has a gradient."""
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.classifier, self.critic):
            x = at = x.detach().clone()
            reach, first, gradients = torch.zeros(()), torch.zeros(()), []
            for number in range(self.steps):
                at = at.detach().requires_grad_()
                z, _ = self.readout(at)
                # Samples are independent in eval mode: the gradient of the sum is every sample's own.
                (gradient,) = torch.autograd.grad(z.sum(), at)
                if number == 0:
                    first = z.detach()
                    reach = (self.radius * self.strength(first)).view(-1, 1, 1, 1)
                at = self.move(at.detach(), gradient, x, reach)
                gradients.append(gradient)
        return Walk(at, first, tuple(gradients), reach)

    def __call__(self, x: Tensor) -> Tensor:
        """Purified images, like `x` (N x C x H x W in [0, 1]), without a gradient. Callable under no_grad, too."""
        return self.walk(x).purified

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        walk = self.walk(x)
        push = torch.zeros_like(walk.purified)
        for gradient in walk.gradients:
            push = push + self.step * walk.reach * gradient.sign()
            push = torch.minimum(torch.maximum(push, -walk.reach), walk.reach)
        return walk.purified, push

    def smoothed(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """The purified images with the gradient of a smoothed move: tanh(g / T) for sign(g), differentiated through
        g (ATTACKS 9.4 A2). T is `temperature` times each image's median |g|, zeros left out.

        Where z is piecewise linear in x (ReLU networks), g has no slope, and this is the identity backward.
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self(x)
        with frozen(self.classifier, self.critic):
            at, reach = x, torch.zeros(())
            for number in range(self.steps):
                z, _ = self.readout(at)
                (gradient,) = torch.autograd.grad(z.sum(), at, create_graph=True)
                if number == 0:
                    reach = (self.radius * self.strength(z.detach())).view(-1, 1, 1, 1)
                exact = self.move(at.detach(), gradient.detach(), x.detach(), reach)
                soft = at + self.step * reach * torch.tanh(gradient / (temperature * usual_size(gradient.detach())))
                at = exact + (soft - soft.detach())
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

    def views(self, classifier: Callable[[Tensor], Tensor]) -> dict[str, View]:
        """ "adaptive" (identity backward), "smoothed" (see `smoothed`), and "averaged": the mean of ten Jacobians in
        a neighbourhood of one grey level. The logits of all three are the deployed ones, bit for bit."""
        adaptive = identity_backward(classifier, self)
        # Differentiating a gradient costs about two more backward passes.
        smoothed = View(
            "smoothed",
            lambda x: classifier(self.smoothed(x)),
            True,
            self.offers,
            (1 + self.steps, 1 + 3 * self.steps),
        )
        return {"adaptive": adaptive, "smoothed": smoothed, "averaged": noise_averaged(adaptive, 10, 1 / 255)}

    def adaptive_attacks(self) -> dict[str, Any]:
        """What ATTACKS 9.3 and 9.4 ask beyond the views; see `casemate.purification.imt_attacks`."""
        from casemate.purification.imt_attacks import procedures

        return procedures(self.rule)


def usual_size(gradient: Tensor) -> Tensor:
    """N x 1 x 1 x 1: the median of each image's |g| where it is not zero; 1 where all of it is zero."""
    size = gradient.abs().flatten(1)
    size = torch.where(size > 0, size, torch.nan).nanmedian(dim=1).values
    return size.nan_to_num(1.0).view(-1, *[1] * (gradient.dim() - 1))
