"""Small systems whose attacks can be worked out by hand, and counters of what an attack really runs."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from casemate.networks.base import Classifier, build_network
from casemate.system import TorchSystem


def linear_system(
    weight: Tensor, bias: Tensor | None = None, shape: tuple[int, int, int] | None = None
) -> TorchSystem:
    """z = W x + b on flattened images."""
    head = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return system(nn.Sequential(nn.Flatten(), head), shape or (1, 1, weight.shape[1]), len(weight))


def system(classifier: nn.Module, shape: tuple[int, int, int], num_classes: int) -> TorchSystem:
    return TorchSystem(classifier, input_shape=shape, num_classes=num_classes)


class Counter(nn.Module):
    """Wraps a classifier: batch sizes of its forwards and of its input gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forwards: list[int] = []
        self.gradients: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        if x.requires_grad:
            x.register_hook(lambda g: self.gradients.append(len(g)))
        out: Tensor = self.inner(x)
        return out


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 images (N x 1 x 8 x 8 in [0, 1]) and labels of the bundled digits."""
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


def fresh_network(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_network("digits_cnn", input_shape=(1, 8, 8), num_classes=10).eval()


@functools.cache
def trained_network() -> Classifier:
    """About 91 % on the last 297 digits; under two seconds."""
    x, y = digits()
    network = fresh_network().train()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(5):
        for rows in torch.randperm(1500).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return network.eval()
