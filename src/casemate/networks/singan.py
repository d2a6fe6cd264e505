"""Generator and critic of one scale of SinGAN (Shaham et al. 2019): what the internal Wasserstein distance trains.

Both are five 3x3 convolutions without padding, so what they say of a place depends on 11 x 11 pixels. Values are
SinGAN's own, about [-1, 1]; the mapping from [0, 1] is the method's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError

DEPTH = 5
PATCH = 2 * DEPTH + 1
"""Side of the patches that a critic compares: its receptive field."""

Scores = Callable[[Tensor], Tensor]
"""A critic: B x C x H x W -> patch scores B x 1 x h x w."""


def width_at(scale: int, *, narrowest: int = 32, widest: int = 128) -> int:
    """Filters at a scale, 0 being the coarsest: doubled every four scales. Inside a network the width is constant:
    the halving of the published code is floored at this very number."""
    doubled: int = narrowest * 2 ** (scale // 4)
    return min(doubled, widest)


class PatchGenerator(nn.Module):
    """previous + tanh(convs(noisy)): a residual on the image of the coarser scale, scaled up (both N x C x H x W).

    `noisy` is the noise of this scale added to `previous`; both are padded by five zeros there, which leaves the
    second as it is after the crop. 29,763 parameters for 3 channels and width 32. `copies` networks lie side by side
    in one, each with weights and statistics of its own: theirs is the channel axis, C channels for each of them.
    """

    def __init__(self, channels: int, *, width: int = 32, copies: int = 1) -> None:
        super().__init__()
        self.body = _body(channels, channels, width, copies)

    def forward(self, noisy: Tensor, previous: Tensor) -> Tensor:
        padded = F.pad(noisy, (DEPTH, DEPTH, DEPTH, DEPTH))
        residual: Tensor = self.body(padded).tanh()
        return previous + residual


class PatchCritic(nn.Module):
    """Scores of all patches (N x 1 x (H - 10) x (W - 10)), no activation; a critic's value is their mean.

    29,185 parameters for 3 channels and width 32. `norm` False leaves out the BatchNorm, which ties the patches of an
    image together and spoils a penalty on each; `copies` as in the generator. Raises UserError for images smaller
    than one patch.
    """

    def __init__(self, channels: int, *, width: int = 32, norm: bool = True, copies: int = 1) -> None:
        super().__init__()
        self.body = _body(channels, 1, width, copies, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < PATCH:
            raise UserError(f"a patch critic needs images of {PATCH}x{PATCH} or more, not {x.shape[2]}x{x.shape[3]}")
        scores: Tensor = self.body(x)
        return scores


def _body(channels_in: int, channels_out: int, width: int, copies: int, *, norm: bool = True) -> nn.Sequential:
    def conv(wide_in: int, wide_out: int) -> nn.Conv2d:
        return nn.Conv2d(copies * wide_in, copies * wide_out, 3, groups=copies)

    layers: list[nn.Module] = []
    for wide in (channels_in, *[width] * (DEPTH - 2)):
        layers += [conv(wide, width), *([nn.BatchNorm2d(copies * width)] if norm else []), nn.LeakyReLU(0.2)]
    body = nn.Sequential(*layers, conv(width, channels_out))
    for module in body:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return body


def gradient_penalty(
    critic: Scores, real: Tensor, fake: Tensor, rho: Tensor, *, norm: Literal["pixel", "image"]
) -> Tensor:
    """(B,) the mean of (|slope| - 1)^2 at rho * real + (1 - rho) * fake, `rho` (B,) in [0, 1].

    `pixel`: of the sum of all patch scores, with a norm over the channels of each pixel, as SinGAN's code. `image`:
    of the critic's value, with one norm over the image, as Gulrajani et al. (2017) and the paper's formula.
    """
    share = rho.view(-1, 1, 1, 1)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    scores = critic(between)
    whole = scores.sum() if norm == "pixel" else scores.mean((1, 2, 3)).sum()
    (slope,) = torch.autograd.grad(whole, between, create_graph=True)
    over = (1,) if norm == "pixel" else (1, 2, 3)
    length = (slope.square().sum(over) + 1e-12).sqrt()  # a root has no slope at zero
    return (length - 1).square().flatten(1).mean(1) if norm == "pixel" else (length - 1).square()
