"""A pyramid of SinGAN pairs over one picture (Shaham et al. 2019), and the losses of IWDA.

Values inside are in [-1, 1]. Several pictures are trained at once, each with networks of its own, which lie side by
side in one (`copies`); every draw comes from a picture's own generator, so none feels the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from casemate.networks.patch_pyramid import resized, size_of
from casemate.networks.singan import PatchCritic, PatchGenerator, Scores, gradient_penalty, width_at
from casemate.objectives import capped_margin, cross_entropy
from casemate.seeding import derive, generator
from casemate.threat import Goal

AMPLITUDE = 0.1
"""Noise at a scale, per root mean square of what the coarser scales leave to add."""

N = TypeVar("N", bound=nn.Module)

# --- losses ---------------------------------------------------------------------------------------------------


def values(critic: Scores, images: Tensor) -> Tensor:
    """(B,) the critic's value of each image: the mean over its patches."""
    return critic(images).mean((1, 2, 3))


def critic_loss(
    critic: Scores, real: Tensor, fake: Tensor, rho: Tensor, *, weight: float, norm: Literal["pixel", "image"]
) -> Tensor:
    """(B,) what the critic descends: f(fake) - f(real) + weight * penalty.

    The paper's Algorithm 1 ascends f(real) - f(fake) + lambda * penalty; a penalty must be subtracted there.
    """
    gap = values(critic, fake) - values(critic, real)
    return gap + weight * gradient_penalty(critic, real, fake, rho, norm=norm)


def classification_loss(logits: Tensor, goal: Goal, objective: Literal["ce", "margin"], cap: float | None) -> Tensor:
    """(N,) L_c: minus the cross-entropy of the label, or that of the target; or minus the margin. With a `cap` a
    picture that is fooled by so much pays no more: without, the term has no lower end and wins over every other."""
    if objective == "margin":
        return -capped_margin(float("inf") if cap is None else cap)(logits, goal)
    gained = cross_entropy(logits, goal)
    return -(gained if cap is None else gained.clamp(max=cap))


# --- one pyramid for each picture -----------------------------------------------------------------------------------


@dataclass
class Pictures:
    """B pictures' pyramids (`levels`, coarsest first, B x C x h x w in [-1, 1]) and the generators fitted so far.

    Sampling starts at scale `start`: from noise if that is 0, else from the picture itself at the scale below.
    """

    levels: list[Tensor]
    start: int
    rngs: list[torch.Generator]
    generators: list[PatchGenerator] = field(default_factory=list)
    """From scale `start` on."""
    amplitudes: list[Tensor] = field(default_factory=list)
    """(B x 1 x 1 x 1) of the noise at each of these scales."""
    anchor: Tensor | None = None
    """z*, the noise that stands for the picture at the coarsest scale."""

    def draw(self, shape: Sequence[int], uniform: bool = False) -> Tensor:
        """One draw of `shape` for each picture, stacked."""
        make = torch.rand if uniform else torch.randn
        return torch.stack([make(tuple(shape), generator=rng) for rng in self.rngs]).to(self.levels[0].device)

    def noise(self, scale: int) -> Tensor:
        """B x C x h x w; of one channel, repeated, at the coarsest scale."""
        channels, height, width = self.levels[scale].shape[1:]
        return self.draw((1 if scale == 0 else channels, height, width)).expand(-1, channels, -1, -1)

    def before(self, scale: int, *, fixed: bool = False) -> Tensor:
        """What a scale builds on: a sample of the coarser ones, or (`fixed`) what they make of the picture."""
        if scale == 0:
            return torch.zeros_like(self.levels[0])
        below = self.image(scale - 1, fixed=fixed) if scale > self.start else self.levels[scale - 1]
        return resized(below, size_of(self.levels[scale]))

    def fixed_noise(self, scale: int) -> Tensor:
        """z* at the coarsest scale, none above."""
        if scale > 0:
            return torch.zeros_like(self.levels[scale])
        if self.anchor is None:
            self.anchor = self.noise(0)
        return self.anchor

    def image(self, scale: int, *, fixed: bool = False) -> Tensor:
        """A sample up to a scale, or the reconstruction."""
        noise = self.fixed_noise(scale) if fixed else self.noise(scale)
        return self.write(scale, noise, self.before(scale, fixed=fixed))

    def write(self, scale: int, noise: Tensor, previous: Tensor) -> Tensor:
        """One scale's generator, applied; statistics are those of the image itself."""
        at = scale - self.start
        noisy = self.amplitudes[at] * noise + previous
        return _unpacked(self.generators[at](_packed(noisy), _packed(previous)), len(previous))

    def grow(self, scale: int, critic: PatchCritic | None, narrowest: int, widest: int, seeds: Sequence[int],
             norm: bool, by_reconstruction: bool) -> PatchCritic:  # fmt: skip
        """Add the generator of the next scale, and give its critic: both start from the weights of the scale before
        where the width is the same. `seeds`: one for each picture."""
        self.amplitudes.append(self._amplitude(scale, by_reconstruction))
        channels, width = self.levels[0].shape[1], width_at(scale, narrowest=narrowest, widest=widest)
        device = self.levels[0].device
        made = _side_by_side(PatchGenerator, seeds, channels, width=width)
        critic_now = _side_by_side(PatchCritic, seeds, channels, width=width, norm=norm)
        if critic is not None and width == width_at(scale - 1, narrowest=narrowest, widest=widest):
            made.load_state_dict(self.generators[-1].state_dict())
            critic_now.load_state_dict(critic.state_dict())
        self.generators.append(made.to(device))
        return critic_now.to(device)

    def _amplitude(self, scale: int, by_reconstruction: bool) -> Tensor:
        real = self.levels[scale]
        if scale == 0:
            return real.new_ones(len(real), 1, 1, 1)
        with torch.no_grad():
            below = self.levels[scale - 1]
            coarse = self.before(scale, fixed=True) if by_reconstruction else resized(below, size_of(real))
            return AMPLITUDE * (real - coarse).square().mean((1, 2, 3), keepdim=True).sqrt()


def side_scores(critic: PatchCritic) -> Scores:
    """The scores of critics that lie side by side, one for each image of the batch."""
    return lambda images: critic(_packed(images))[0][:, None]


def _packed(images: Tensor) -> Tensor:
    """B x C x H x W -> 1 x (B * C) x H x W, as networks side by side take them."""
    return images.reshape(1, -1, *images.shape[-2:])


def _unpacked(images: Tensor, pictures: int) -> Tensor:
    return images.reshape(pictures, -1, *images.shape[-2:])


def _side_by_side(kind: Callable[..., N], seeds: Sequence[int], channels: int, **options: int) -> N:
    """One network of `kind` for each seed, as one; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        parts = []
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            parts.append(kind(channels, **options).state_dict())
        together = kind(channels, **options, copies=len(seeds))
    joined = {key: torch.cat([part[key] for part in parts]) for key, value in parts[0].items() if value.dim()}
    together.load_state_dict(joined, strict=False)  # the rest counts batches, which nothing here reads
    return together.train()


def picture_rngs(seed: int, rows: Sequence[int]) -> list[torch.Generator]:
    """Each picture's own generator, whatever pictures are beside it."""
    return [generator(seed, "picture", row) for row in rows]


def picture_seeds(seed: int, rows: Sequence[int], scale: int) -> list[int]:
    """What the weights of each picture's networks at a scale are drawn from."""
    return [derive(seed, "weights", row, scale) for row in rows]
