"""Networks that write perturbations, and one that reads them: those of ADT, L2L and L2L-DA, for attacks and defenses.

A generator maps N x C_in x H x W (an image, gradients, what the method feeds it) to N x C_out x H x W. What its
output means, and the radius, is the method's business. Parameter counts are those of the authors' networks.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.networks.base import Shape, require_divisible

HIDDEN = 256
"""Width of the hidden layer that turns ADT's noise into a map."""


# --- adversarial distributional training (Dong et al. 2020) ---------------------------------------------------


class ResidualGenerator(nn.Module):
    """ADT's generator: full resolution throughout, three residual blocks of widths 2w, 2w, w, no output activation.

    10,330,880 parameters for 9 -> 6 channels and width 256; 10,606,080 for 10 -> 3 with a noise map of 64 numbers on
    32 x 32, which `channels_in` counts as one channel.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, width: int = 256, z_dim: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.noise: NoiseMap | None = None
        if z_dim:
            if size is None:
                raise ValueError("a noise map needs the images' size")
            self.noise = NoiseMap(z_dim, size)
        self.stem = nn.Sequential(_conv3(channels_in, width), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(width, 2 * width), ResidualBlock(2 * width, 2 * width), ResidualBlock(2 * width, width)
        )
        self.head = _conv3(width, channels_out)
        _small_normal(self)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        if self.noise is not None:
            assert z is not None
            x = torch.cat([x, self.noise(z).to(x.dtype)], 1)
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class NoiseMap(nn.Module):
    """N x z_dim -> N x 1 x H x W, by two linear layers with a ReLU after each."""

    def __init__(self, z_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(
            nn.Linear(z_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size[0] * size[1]), nn.ReLU()
        )

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(z)
        return out.view(len(z), 1, *self.size)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm; the ReLU follows the sum. A 1x1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv3(width_in, width_out), nn.BatchNorm2d(width_out), nn.ReLU(),
            _conv3(width_out, width_out), nn.BatchNorm2d(width_out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width_out:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class PosteriorEncoder(nn.Module):
    """ADT's q(z | perturbation): mean and variance (N x z_dim each) of a diagonal Gaussian over the noise.

    724,384 parameters for 3 channels and 64 numbers. The authors' convolutions are unpadded, which takes 20 pixels;
    smaller images get padding, and the final pooling is over whatever is left.
    """

    def __init__(self, channels: int, z_dim: int, size: tuple[int, int], *, width: int = 32) -> None:
        super().__init__()
        self.z_dim, layers, wide = z_dim, [], channels
        for out, kernel, stride in ((width, 5, 1), (2 * width, 4, 2), (4 * width, 4, 1), (8 * width, 4, 2)):
            padding = 0 if min(size) >= 20 else kernel // 2
            conv = nn.Conv2d(wide, out, kernel, stride, padding, bias=False)
            nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / (kernel * kernel * out)))
            layers += [conv, nn.BatchNorm2d(out), nn.LeakyReLU()]
            wide = out
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(wide, 2 * z_dim)
        nn.init.zeros_(self.head.bias)

    def forward(self, perturbation: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.head(self.trunk(perturbation)).float().split(self.z_dim, 1)
        return mean, F.softplus(raw)


# --- learning to learn (Jiang et al. 2021, the official code) ------------------------------------------------


class WideAttacker(nn.Module):
    """L2L's default attacker: values in [-1, 1] by a stem, four pre-activation blocks (2w, 4w, 2w, w) and a 3x3 head.

    1,747,851 parameters for 6 -> 3 channels and width 64; the authors' 1,747,852 count a scale that nothing reads.
    """

    def __init__(self, channels_in: int, channels_out: int, *, width: int = 64) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width, 2 * width, width)
        self.body = nn.Sequential(
            _stem(nn.Conv2d(channels_in, width, 3, padding=1, bias=False), width),
            *(PreActBlock(a, b) for a, b in pairwise(widths)),
            nn.BatchNorm2d(width, affine=False),
            nn.Conv2d(width, channels_out, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


class SlimAttacker(nn.Module):
    """L2L's slim attacker: at half resolution, back by a transposed convolution, joined with the input; tanh(s * .)
    with a learnt s that begins at 5. Height and width must be even.

    1,434,359 parameters for 6 -> 3 channels and width 128.
    """

    def __init__(self, channels_in: int, channels_out: int, *, width: int = 128) -> None:
        super().__init__()
        narrow = max(width // 8, 1)
        self.body = nn.Sequential(
            _stem(nn.Conv2d(channels_in, width, 3, 2, 1, bias=False), width),
            PreActBlock(width, 2 * width), PreActBlock(2 * width, width), nn.BatchNorm2d(width, affine=False),
            _stem(nn.ConvTranspose2d(width, narrow, 4, 2, 1, bias=False), narrow),
        )  # fmt: skip
        self.head = nn.Conv2d(narrow + channels_in, channels_out, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.full((1,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.head(torch.cat([self.body(x), x], 1)))


class PreActBlock(nn.Module):
    """BatchNorm without affine, PReLU, 3x3 convolution, twice; a 1x1 shortcut on the raw input if widths differ."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width_in, affine=False), nn.PReLU(), _xavier(nn.Conv2d(width_in, width_out, 3, padding=1)),
            nn.BatchNorm2d(width_out, affine=False), nn.PReLU(),
            _xavier(nn.Conv2d(width_out, width_out, 3, padding=1)),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width_out:
            self.shortcut = _xavier(nn.Conv2d(width_in, width_out, 1), gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


def _stem(conv: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(width, eps=1e-3), nn.ReLU())


def _xavier(conv: nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Conv2d:
    nn.init.xavier_uniform_(conv.weight, gain=gain)
    return conv


# --- L2L-DA (Jang et al. 2019) --------------------------------------------------------------------------------


class UNetGenerator(nn.Module):
    """L2L-DA's U-Net, values in [-1, 1]; noise z enters every encoder level, the label every normalisation.

    495,184 parameters for 1 channel (3 in the input), 500,944 for 3, both with 10 classes, and 573,904 for 3 with
    200 classes; 466,048 for 6 -> 3 without noise and label, which is L2L-DA's re-implementation of L2L.

    Args:
        z_dim: numbers of noise per image; 0 for none.
        num_classes: for class-conditional normalisation; 0 for plain BatchNorm.
        deeper: a third level, as for larger images.

    Raises UserError for images whose height or width does not halve as often as there are levels.
    """

    def __init__(
        self, channels_in: int, channels_out: int, input_shape: Shape, *, width: int = 64, z_dim: int = 8,
        num_classes: int = 0, deeper: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        require_divisible("U-Net generator", input_shape, 8 if deeper else 4)
        widths = (width, width, 2 * width, 4 * width) if deeper else (width, width, 2 * width)
        self.noise = _noise_layers(z_dim) if z_dim else None
        self.down = nn.ModuleList(
            DownStep(a + z_dim, b, num_classes, first=level == 0, bare=level in (0, len(widths) - 1))
            for level, (a, b) in enumerate(zip((channels_in, *widths), widths, strict=False))
        )
        ups = [(2 * width, width), (2 * width, width)]
        if deeper:
            ups = [(4 * width, 2 * width), (4 * width, width), (2 * width, width)]
        self.up = nn.ModuleList(UpStep(a, b, num_classes) for a, b in ups)
        self.head = nn.Conv2d(2 * width, channels_out, 3, padding=1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """`y` (N,) labels where it is conditional, `z` (N x z_dim) where it has noise."""
        code = None
        if self.noise is not None:
            assert z is not None
            code = self.noise(z).to(x.dtype)[:, :, None, None]
        skips: list[Tensor] = []
        for step in self.down:
            x = step(x if code is None else torch.cat([x, code.expand(-1, -1, *x.shape[2:])], 1), y)
            skips.append(x)
        for step, skip in zip(self.up, skips[-2::-1], strict=True):
            x = torch.cat([step(x, y), skip], 1)
        return torch.tanh(self.head(x))


class DownStep(nn.Module):
    """A convolution that halves the size (but not the `first`), normalised unless `bare`, LeakyReLU 0.2."""

    def __init__(self, width_in: int, width_out: int, num_classes: int, *, first: bool, bare: bool) -> None:
        super().__init__()
        kernel, stride = (3, 1) if first else (4, 2)
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, 1, bias=False)
        self.norm = None if bare else ConditionalBatchNorm(width_out, num_classes)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        x = self.conv(x)
        return F.leaky_relu(x if self.norm is None else self.norm(x, y), 0.2)


class UpStep(nn.Module):
    """A transposed convolution that doubles the size, normalised, ReLU."""

    def __init__(self, width_in: int, width_out: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(width_in, width_out, 4, 2, 1, bias=False)
        self.norm = ConditionalBatchNorm(width_out, num_classes)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        return F.relu(self.norm(self.conv(x), y))


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose scale and shift are a shared row plus one row per class; plain with `num_classes` 0."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, eps=1e-10, affine=False)
        self.scale, self.shift = nn.Parameter(torch.empty(width)), nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.scale, 1.0, 0.02)
        self.class_scale: nn.Parameter | None = None
        if num_classes:
            self.class_scale = nn.Parameter(torch.empty(num_classes, width))
            self.class_shift = nn.Parameter(torch.zeros(num_classes, width))
            nn.init.normal_(self.class_scale, 0.0, 0.02)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        scale, shift = self.scale[None], self.shift[None]
        if self.class_scale is not None:
            assert y is not None
            scale, shift = scale + self.class_scale[y], shift + self.class_shift[y]
        out: Tensor = self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return out


def _noise_layers(z_dim: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(z_dim, z_dim), nn.ReLU(), nn.Linear(z_dim, z_dim), nn.ReLU())
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers


def _conv3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)


def _small_normal(module: nn.Module) -> None:
    """Weights N(0, 0.02), biases 0, BatchNorm scales N(1, 0.02)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            nn.init.normal_(part.weight, float(isinstance(part, nn.BatchNorm2d)), 0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
