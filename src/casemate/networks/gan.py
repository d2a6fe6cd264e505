"""The image GAN of Defense-GAN (Samangouei et al. 2018): a generator of images and its Wasserstein critic.

Layers of the authors' code for MNIST and Fashion-MNIST (kabkabm/defensegan): no BatchNorm, images in [0, 1].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.networks.base import Shape

FIRST = 4
"""Height and width of the generator's first maps."""


class ImageGenerator(nn.Module):
    """N x latent -> images N x C x H x W in [0, 1]: 4 x 4 maps by a linear layer, then three 5x5 deconvolutions.

    Where 8 x 8 maps are more than a quarter of the image needs they are cropped (7 x 7 for 28 x 28). 1,554,177
    parameters for 1 x 28 x 28 images, latent 128 and width 64. Raises UserError unless the images are square, their
    side a multiple of 4 and 32 at most.
    """

    def __init__(self, shape: Shape, *, latent: int = 128, width: int = 64) -> None:
        super().__init__()
        channels, height, side = shape
        if height != side or side % 4 or side > 8 * FIRST:
            raise UserError(f"the generator makes square images of 4, 8, ... 32 pixels, not {height}x{side}")
        self.latent, self.crop, self.width = latent, side // 4, width
        self.linear = nn.Linear(latent, 4 * width * FIRST * FIRST)
        self.deconv1 = _deconv(4 * width, 2 * width)
        self.deconv2 = _deconv(2 * width, width)
        self.deconv3 = _deconv(width, channels)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.linear(z)).view(len(z), 4 * self.width, FIRST, FIRST)
        h = F.relu(self.deconv1(h))[:, :, : self.crop, : self.crop]
        out: Tensor = self.deconv3(F.relu(self.deconv2(h))).sigmoid()
        return out


class ImageCritic(nn.Module):
    """Images N x C x H x W -> (N,): three 5x5 convolutions of stride 2 with leaky ReLUs, and a linear layer.

    1,030,145 parameters for 1 x 28 x 28 images and width 64.
    """

    def __init__(self, shape: Shape, *, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        wide, (_, height, side) = shape[0], shape
        for wider in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(wide, wider, 5, 2, padding=2), nn.LeakyReLU(0.2)]
            wide, height, side = wider, (height + 1) // 2, (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(wide * height * side, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)[:, 0]
        return out


def _deconv(width_in: int, width_out: int) -> nn.ConvTranspose2d:
    """Twice the height and width ("same" padding)."""
    return nn.ConvTranspose2d(width_in, width_out, 5, 2, padding=2, output_padding=1)
