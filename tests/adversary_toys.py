"""What the tests of defenses with a learned adversary share: images that halve twice, and the probes of a step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from stepping import Bench, Probe, batch
from torch import Tensor, nn

from casemate.networks.base import Classifier
from casemate.networks.blocks import GlobalMean
from casemate.threat import ThreatModel


def square_network(channels: int = 6, num_classes: int = 4) -> Classifier:
    """conv-BN-ReLU-mean-linear on 1 x 8 x 8 images."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Sequential(nn.Conv2d(1, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        "pool": GlobalMean(),
    }
    return Classifier(
        input_shape=(1, 8, 8), num_classes=num_classes, layers=layers, head=nn.Linear(channels, num_classes)
    )


def dense_network() -> Classifier:
    """Flat-linear-ReLU-linear on 1 x 8 x 8 images: no statistics, learns a batch in a few steps."""
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    return Classifier(input_shape=(1, 8, 8), num_classes=4, layers={"fc": hidden}, head=nn.Linear(32, 4))


def square_batch(n: int = 8) -> tuple[Tensor, Tensor]:
    """`stepping.batch` in a frame."""
    x, y = batch(n)
    return F.pad(x, (1, 1, 1, 1), value=0.4), y


@dataclass
class Looked:
    """One step, looked at from the classifier (f) and the generator (g)."""

    bench: Bench
    f: Probe
    g: Probe
    before: dict[str, nn.Module]
    """The modules as they were, in train mode."""
    updates: list[tuple[tuple[str, ...], float]]
    x: Tensor
    y: Tensor

    @property
    def images(self) -> tuple[int, int]:
        """(forward passes of f before its weights learn, those that teach them), in batches of the training size."""
        sizes = [len(seen) / len(self.x) for seen in self.f.inputs]
        frozen = sum(size for size, flag in zip(sizes, self.f.frozen, strict=True) if flag)
        return round(frozen), round(sum(sizes) - frozen)


def look_at(defense: Any, *, roll: int = 0, fraction: float = 0.0, **options: Any) -> Looked:
    """A first step of the defense on `square_batch`, its labels rolled by `roll`."""
    bench, (x, y) = Bench(defense, **{"network": square_network, **options}), square_batch()
    y = y.roll(roll)
    before = {name: copy.deepcopy(module).train() for name, module in bench.modules.items()}
    with Probe(bench.f) as f, Probe(bench.modules.get("generator", nn.Identity())) as g:
        updates = bench.step(x, y, fraction)
    return Looked(bench, f, g, before, updates, x, y)


def learns(defense: Any, *, steps: int = 60, radius: float = 0.05, lr: float = 0.02) -> tuple[float, float, float]:
    """(first CE on the clean batch, last, accuracy on it at the end) of `steps` Adam steps on one batch."""
    bench = Bench(defense, dense_network, ThreatModel("linf", radius), lr=lr, optimizer=torch.optim.Adam)
    x, y = square_batch()
    first = F.cross_entropy(bench.f(x), y).item()
    for _ in range(steps):
        bench.step(x, y)
    logits = bench.f(x).detach()
    return first, F.cross_entropy(logits, y).item(), float((logits.argmax(1) == y).float().mean())


def conv_means(network: Any, x: Tensor) -> Tensor:
    """What `square_network`'s running mean is after one train-mode pass over `x`."""
    means: Tensor = 0.1 * network.body["conv"][0](x).detach().mean((0, 2, 3))
    return means


def running_mean(bench: Bench) -> Tensor:
    body: Any = bench.f.body
    mean: Tensor = body["conv"][1].running_mean
    return mean
