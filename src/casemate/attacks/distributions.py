"""Distributions over perturbations, as adversarial distributional training has them (Dong et al. 2020).

The density and entropy pieces in one place, for the attacks EXP, EXP-AM and IMP-AM and for the defenses that train
on them. Values per image are never averaged over the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casemate.attacks.ascent import per_sample

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
SATURATED = 10.0
"""|u| beyond which log(1 - tanh(u)^2) is held: the density there is below anything float32 tells apart."""

GradientInput = Literal["batch", "batch64", "maxabs", "frobenius", "rms"]


@dataclass(frozen=True)
class TanhGaussian:
    """delta = radius * tanh(u), u = mean + sigma * r with r ~ N(0, I) and sigma = softplus(rho), for every pixel.

    `mean` and `rho` are N x C x H x W. Inside the open linf ball by construction; the cut of x + delta to [0, 1] is
    not part of the density (ATTACKS 7.1).
    """

    mean: Tensor
    rho: Tensor
    radius: float

    def __getitem__(self, index: Tensor) -> TanhGaussian:
        """Those of the images at `index`."""
        return TanhGaussian(self.mean[index], self.rho[index], self.radius)

    def latent(self, noise: Tensor) -> Tensor:
        """u for standard normal `noise`."""
        return self.mean + F.softplus(self.rho) * noise

    def perturb(self, x: Tensor, noise: Tensor) -> Tensor:
        """x + delta cut to [0, 1], for standard normal `noise`; zeros give the centre, radius * tanh(mean)."""
        return (x + self.radius * self.latent(noise).tanh()).clamp(0.0, 1.0)

    def surprisal(self, noise: Tensor) -> Tensor:
        """Minus log density of delta in each pixel, in nats; its mean over draws estimates the entropy.

        r^2/2 + log(2 pi)/2 + log sigma + log(1 - tanh(u)^2) + log radius, the fourth term in a form that does not
        round to log 0. The authors leave out both constants.
        """
        u = self.latent(noise).clamp(-SATURATED, SATURATED)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        constant = LOG_ROOT_2PI + math.log(self.radius)
        return noise.square() / 2 + F.softplus(self.rho).log() + log_slope + constant


def posterior_surprisal(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(N,) minus log q(z), N(mean, diag variance), in nats per number: an upper bound on what z lacks to be known
    from the perturbation. A q that ignores the perturbation reaches 0.8696 for z ~ U(-1, 1), by mean 0, variance 1/3.
    """
    terms = (z - mean).square() / (2 * variance + 1e-8) + (variance + 1e-8).log() / 2 + LOG_ROOT_2PI
    return terms.mean(1)


def uniform_noise(n: int, z_dim: int, rng: torch.Generator) -> Tensor:
    """N x z_dim numbers, uniform in [-1, 1], on the CPU."""
    return torch.rand(n, z_dim, generator=rng) * 2 - 1


def scaled_gradient(gradient: Tensor, how: GradientInput) -> Tensor:
    """Gradients of per-sample losses as a generator's input.

    "batch" is what the authors' batch mean gives, "batch64" the same as if there were always their 64 images;
    "maxabs", "frobenius" and "rms" scale each image's gradient to a largest entry, an l2 norm, or a root mean square,
    of 1 (zero stays zero).
    """
    if how in ("batch", "batch64"):
        return gradient / (len(gradient) if how == "batch" else 64)
    # By the largest entry first: the squares of small gradients are below what float32 holds.
    unit = gradient / per_sample(gradient.flatten(1).abs().amax(1), gradient)
    if how == "maxabs":
        return unit
    squares = unit.flatten(1).square()
    return unit / per_sample((squares.mean(1) if how == "rms" else squares.sum(1)).sqrt(), unit)
