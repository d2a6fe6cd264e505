"""Threat models: what an attacker may do to an image. Images are N x C x H x W floats in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
TOLERANCE = 1e-6  # in pixel units; float32 rounding of x + delta stays below it


@dataclass(frozen=True)
class ThreatModel:
    """An lp ball of `radius` (pixel units) around the clean image, cut to the box [0, 1]."""

    norm: Norm
    radius: float

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball, then of the box (clipping last can only shrink the distance)."""
        if self.norm == "linf":
            x_adv = torch.minimum(torch.maximum(x_adv, x - self.radius), x + self.radius)
        else:
            delta = x_adv - x
            scale = (self.radius / _l2(delta).clamp_min(1e-12)).clamp(max=1.0)
            x_adv = x + delta * scale.view(-1, 1, 1, 1)
        return x_adv.clamp(0.0, 1.0)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Distance per image (N,), in pixel units."""
        delta = x_adv - x
        return delta.abs().flatten(1).amax(1) if self.norm == "linf" else _l2(delta)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Per image (N,) bool: inside ball and box, and finite."""
        flat = x_adv.flatten(1)
        # Extrema carry NaN and infinities along, and every comparison with NaN is false.
        inside = (flat.amin(1) >= -TOLERANCE) & (flat.amax(1) <= 1 + TOLERANCE)
        slack = TOLERANCE if self.norm == "linf" else TOLERANCE * max(1.0, x[0].numel() ** 0.5)
        return inside & (self.distance(x_adv, x) <= self.radius + slack)

    def random_start(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """A uniform point of the ball around each image, NOT cut to the box (the caller projects).

        Drawn in the order of the pixels, whatever the memory format of `x`, which the result shares.
        """
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=rng).to(x.device)
            return x.clone().add_(noise.mul_(2).sub_(1), alpha=self.radius)
        direction = torch.randn(x.shape, generator=rng).to(x.device)
        share = torch.rand(len(x), generator=rng).to(x.device) ** (1 / x[0].numel())
        scale = self.radius * share / _l2(direction).clamp_min(1e-12)
        return x.clone().add_(direction * scale.view(-1, 1, 1, 1))

    def __str__(self) -> str:
        return f"{self.norm} {radius_text(self.radius)}"


def radius_text(radius: float) -> str:
    """`8/255` where the radius is a whole number of grey levels, else up to six digits."""
    levels = radius * 255
    if radius and abs(levels - round(levels)) < 1e-4 and round(levels) > 0 and abs(radius * 100 % 1) > 1e-9:
        return f"{round(levels)}/255"
    return f"{radius:.6g}"


def _l2(delta: Tensor) -> Tensor:
    norm: Tensor = delta.flatten(1).norm(dim=1)
    return norm


@dataclass(frozen=True)
class Goal:
    """What counts as success: the decision is not `labels`, or is `targets` where they are given. Both (N,) long."""

    labels: Tensor
    targets: Tensor | None = None

    def reached(self, decisions: Tensor) -> Tensor:
        """(N,) bool from decided labels; -1 means rejected, which is never a success for the attacker."""
        hit = decisions != self.labels if self.targets is None else decisions == self.targets
        return hit & (decisions >= 0)

    def __getitem__(self, index: Tensor) -> Goal:
        return Goal(self.labels[index], None if self.targets is None else self.targets[index])


def untargeted(labels: Tensor) -> Goal:
    """Any class but the true one."""
    return Goal(labels)


def targeted(labels: Tensor, targets: Tensor) -> Goal:
    """Exactly `targets`."""
    return Goal(labels, targets)
