"""Critics of ATLD: networks that tell codes of clean images from codes of adversarial ones.

A critic maps codes (N x d, or N x C x H x W maps) to `(z, class_logits)`: z (N,) is the logit of "clean"
(target 1 = clean, 0 = adversarial), class_logits is N x classes. The layers are those of the code of Qian et al.
2021 (LitterQ/ATLD-pytorch).
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from casemate.errors import UserError
from casemate.networks.base import Classifier
from casemate.networks.wrn import wide_stages

Form = Literal["conv3x3", "conv1x1"]
Latent = Literal["logits", "penultimate"]
M = TypeVar("M", bound=nn.Module)


class Critic(nn.Module):
    """Base of both critics: `trunk` gives N x width x H x W maps, or N x width vectors in the 1x1 form."""

    def __init__(self, trunk: nn.Sequential, width: int, num_classes: int, form: Form) -> None:
        super().__init__()
        self.dense = form == "conv1x1"
        self.trunk = centre_taps(trunk) if self.dense else trunk
        self.score, self.classes = nn.Linear(width, 1), nn.Linear(width, num_classes)

    def pooled(self, codes: Tensor) -> tuple[Tensor, int, int]:
        """(N x width pooled features, height, width of the last map)."""
        if self.dense:
            return self.trunk(codes.flatten(1)), 1, 1
        maps: Tensor = self.trunk(codes if codes.ndim == 4 else codes[:, :, None, None])
        return maps.mean((2, 3)), maps.shape[2], maps.shape[3]

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        pooled, _, _ = self.pooled(codes)
        return self.score(pooled)[:, 0], self.classes(pooled)


class WideCritic(Critic):
    """WRN-`depth`-`width` whose stem reads `channels` numbers as the channels of a 1x1 map.

    28-5 on 10 (100) logits has 9,133,963 (9,175,813) parameters in the form "conv3x3".
    """

    def __init__(self, channels: int, num_classes: int, *, form: Form, depth: int = 28, width: int = 5) -> None:
        wide = 64 * width
        trunk = nn.Sequential(*wide_stages(channels, depth, width).values(), nn.BatchNorm2d(wide), nn.ReLU())
        super().__init__(trunk, wide, num_classes, form)
        nn.init.zeros_(self.score.bias)
        nn.init.zeros_(self.classes.bias)


class FeatureCritic(Critic):
    """The image-GAN stack that reads the last feature map (`channels` x H x W), with a class head on its pooled end.

    The form "conv1x1" needs codes without spatial extent. The score is the published 1x1 convolution with padding
    1 followed by a global average: the padding adds places where only the bias is seen.
    """

    def __init__(self, channels: int, num_classes: int, *, form: Form) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU()]
        wide = 64
        for wider, stride in ((64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2)):
            layers += [nn.Conv2d(wide, wider, 3, stride, padding=1), nn.BatchNorm2d(wider), nn.SiLU()]
            wide = wider
        super().__init__(nn.Sequential(*layers), wide, num_classes, form)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        pooled, height, width = self.pooled(codes)
        share = height * width / ((height + 2) * (width + 2))
        return F.linear(pooled * share, self.score.weight, self.score.bias)[:, 0], self.classes(pooled)


def read_codes(classifier: Classifier, x: Tensor, latent: Latent) -> tuple[Tensor, Tensor]:
    """(logits N x classes, codes): the codes are the logits, or what the last layer before the pool (or the head,
    in a network without one) puts out. One forward pass."""
    if latent == "logits":
        logits: Tensor = classifier(x)
        return logits, logits
    layer = [name for name in classifier.layers if name != "pool"][-1]
    seen = classifier.taps(x, [layer, "head"])
    return seen["head"], seen[layer]


def build_critic(
    code_shape: tuple[int, ...], num_classes: int, *, latent: Latent,
    form: Form, depth: int = 28, width: int = 5,
) -> Critic:  # fmt: skip
    """The critic for codes of that shape: (d,) or (C, H, W). Raises UserError if the 1x1 form meets a real map."""
    if latent == "logits":
        return WideCritic(code_shape[0], num_classes, form=form, depth=depth, width=width)
    if form == "conv1x1" and len(code_shape) == 3 and code_shape[1:] != (1, 1):
        raise UserError(
            f"critic form 'conv1x1' needs codes without spatial extent, and this network's features are "
            f"{'x'.join(map(str, code_shape))}: set critic_form 'conv3x3'"
        )
    return FeatureCritic(code_shape[0], num_classes, form=form)


def centre_taps(module: M) -> M:
    """The same function on 1x1 maps, without the dead weights: `module` is changed in place and returned.

    With padding 1 a 3x3 kernel meets nothing but its centre on a 1x1 map, so each convolution becomes a linear
    layer that keeps the centre taps (and so the initial scale of the 3x3 kernel), and each BatchNorm2d a BatchNorm1d.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, _linear(child))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _vector_norm(child))
        else:
            centre_taps(child)
    return module


def _linear(conv: nn.Conv2d) -> nn.Linear:
    # On "meta" nothing is drawn, so one seed gives both forms the same function.
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
    centre = conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2]
    linear.weight = nn.Parameter(centre.detach().clone())
    if conv.bias is not None:
        linear.bias = nn.Parameter(conv.bias.detach().clone())
    return linear


def _vector_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm1d:
    vector = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    vector.load_state_dict(norm.state_dict())
    return vector
