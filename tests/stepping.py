"""What the training loop does with one batch, in a few lines, and the probes that tests of defenses put on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.networks.base import Classifier
from casemate.networks.blocks import GlobalMean
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task

LINF = ThreatModel("linf", 0.1)


def normed_network(channels: int = 6, num_classes: int = 4) -> Classifier:
    """conv-BN-ReLU-mean-linear on 1 x 6 x 6 images: the smallest thing with running statistics."""
    torch.manual_seed(0)
    layers = {
        "conv": nn.Sequential(nn.Conv2d(1, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
        "pool": GlobalMean(),
    }
    return Classifier(
        input_shape=(1, 6, 6), num_classes=num_classes, layers=layers, head=nn.Linear(channels, num_classes)
    )


def linear_network(weight: list[list[float]]) -> Classifier:
    """Logits W x of the flattened image."""
    head = nn.Linear(len(weight[0]), len(weight), bias=False)
    head.weight.data = torch.tensor(weight)
    return Classifier(input_shape=(1, 1, 2), num_classes=len(weight), layers={"flat": nn.Flatten()}, head=head)


def batch(n: int = 8, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images 1 x 6 x 6 well inside [0, 1], whose class is a bright column, and labels."""
    g = torch.Generator().manual_seed(1)
    y = torch.arange(n) % num_classes
    x = 0.3 + 0.2 * torch.rand(n, 1, 6, 6, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, :, :, label] += 0.3
    return x, y


@dataclass
class Bench:
    """A defense with its modules and players, stepped as the loop steps it."""

    defense: Defense
    network: Callable[[], nn.Module] = normed_network
    threat: ThreatModel = LINF
    lr: float = 0.05
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD
    modules: dict[str, nn.Module] = field(init=False)
    players: dict[str, Player] = field(init=False)
    ctx: Context = field(init=False)

    def __post_init__(self) -> None:
        def player(parameters: Any, *, lr_scale: float = 1.0, **changes: Any) -> Player:
            kept = list(parameters)
            return Player(kept, self.optimizer(kept, **{"lr": self.lr * lr_scale, **changes}))  # type: ignore[call-arg]

        made = self.network()
        assert isinstance(made, Classifier)
        task = Task(made.input_shape, made.num_classes, self.threat, lambda: made, player)
        torch.manual_seed(0)
        self.modules = self.defense.modules(task)
        self.players = self.defense.players(task, self.modules)
        self.ctx = Context(self.modules, self.threat)

    @property
    def f(self) -> Classifier:
        made = self.modules["classifier"]
        assert isinstance(made, Classifier)
        return made

    def updates(self, x: Tensor, y: Tensor, fraction: float = 0.0) -> Iterator[tuple[tuple[str, ...], float]]:
        """One batch: after each update, (its players, its loss)."""
        for module in self.modules.values():
            module.train()
        self.ctx.fraction, self.ctx.rng = fraction, generator("step", self.ctx.step)
        for update in self.defense.step(self.ctx, x, y):
            parameters = [p for name in update.players for p in self.players[name].parameters]
            for name in update.players:
                self.players[name].optimizer.zero_grad(set_to_none=True)
            loss = update.loss()
            torch.autograd.backward(loss, inputs=[*parameters, *update.extra_leaves])
            for name in update.players:
                self.players[name].optimizer.step()
            yield update.players, loss.item()
        self.ctx.step += 1

    def step(self, x: Tensor, y: Tensor, fraction: float = 0.0) -> list[tuple[tuple[str, ...], float]]:
        return list(self.updates(x, y, fraction))


@dataclass
class Probe:
    """Forward and backward passes through a module, in order."""

    module: nn.Module
    train: list[bool] = field(default_factory=list)
    """Mode of each forward pass."""
    frozen: list[bool] = field(default_factory=list)
    """Whether no parameter needed a gradient during it."""
    inputs: list[Tensor] = field(default_factory=list)
    backwards: int = 0

    def __enter__(self) -> Probe:
        self._handle = self.module.register_forward_hook(self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        self.train.append(module.training)
        self.frozen.append(not any(p.requires_grad for p in module.parameters()))
        self.inputs.append(args[0].detach().clone())
        first = out if isinstance(out, Tensor) else out[0]
        if first.requires_grad:
            first.register_hook(self._backward)

    def _backward(self, *_: object) -> None:
        self.backwards += 1


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def moved(before: dict[str, Tensor], module: nn.Module) -> bool:
    """Whether every parameter has changed."""
    return all(not torch.equal(before[key], value) for key, value in module.named_parameters())


def tracked(module: nn.Module) -> int:
    """Forward passes that have moved the running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    counts = {int(m.num_batches_tracked) for m in norms if m.num_batches_tracked is not None}
    assert len(counts) == 1
    return counts.pop()
