"""Small nets and a small trained system for the deploy tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.data import Loaded
from casemate.deploy.metadata import About
from casemate.networks.base import build_network
from casemate.networks.critics import build_critic
from casemate.purification.imt import IMT
from casemate.system import TorchSystem

SHAPE = (1, 8, 8)
ABOUT = About("digits", tuple("0123456789"), "linf", 0.1, "atld", "row", "1.2.3")


class Block(nn.Module):
    """A ResNet-20 block, its shortcut without parameters."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width_out), nn.BatchNorm2d(width_out)
        self.stride, self.more = stride, (width_out - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(h + x)


class PreAct(nn.Module):
    """A pre-activation block with a strided projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.short = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(x))
        return self.conv(h) + self.short(h)


def settled(net: nn.Module, channels: int = 1, size: int = 8) -> nn.Module:
    """Batch statistics from data, and no batch-norm scale or shift at its initial value."""
    rng = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data = torch.rand(module.weight.shape, generator=rng) + 0.5
            module.bias.data = torch.randn(module.bias.shape, generator=rng) * 0.2
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(32, channels, size, size, generator=rng))
    return net.eval()


def imt_system(
    rule: str = "full", *, steps: int = 1, network: str = "digits_cnn", form: str = "conv1x1", radius: float = 0.1
) -> TorchSystem:
    """Untrained, with a small critic whose scores spread over (0, 1)."""
    torch.manual_seed(0)
    classifier = build_network(network, input_shape=SHAPE, num_classes=10).eval()
    critic = settled_critic(classifier, form)
    step = 1.0 if steps == 1 else 0.5
    imt = IMT(classifier, critic, radius=radius, rule=rule, steps=steps, step=step)  # type: ignore[arg-type]
    return TorchSystem(classifier, input_shape=SHAPE, num_classes=10, purification=imt, name="toy")


def settled_critic(classifier: nn.Module, form: str = "conv1x1") -> nn.Module:
    critic = build_critic((10,), 10, latent="logits", form=form, depth=10, width=1)  # type: ignore[arg-type]
    x = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    critic.train()
    with torch.no_grad():
        for _ in range(5):
            critic(classifier(x))
        critic.eval()
        z, _ = critic(classifier(x))
        critic.score.weight /= z.std()
        critic.score.bias.copy_((critic.score.bias - z.mean()) / z.std())
    return critic


def fitted_system(images: Loaded) -> TorchSystem:
    """The digits network fitted for a moment, and a critic fitted to tell its codes of images from noisy ones'."""
    system = imt_system("interval")
    assert isinstance(system.purification, IMT)
    classifier, critic = system.classifier.train(), system.purification.critic.train()
    _, train, _ = images
    x = torch.tensor(train.images).permute(0, 3, 1, 2).contiguous().float() / 255
    y = torch.tensor(train.labels).long()
    rng = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam([*classifier.parameters(), *critic.parameters()], 3e-3)
    for _ in range(60):
        some = torch.randint(len(x), (128,), generator=rng)
        codes = classifier(x[some])
        noisy = classifier((x[some] + 0.3 * torch.randn(x[some].shape, generator=rng)).clamp(0, 1))
        apart = F.softplus(-critic(codes.detach())[0]).mean() + F.softplus(critic(noisy.detach())[0]).mean()
        optimizer.zero_grad()
        (F.cross_entropy(codes, y[some]) + apart).backward()
        optimizer.step()
    classifier.eval().requires_grad_(False)
    critic.eval().requires_grad_(False)
    return system
