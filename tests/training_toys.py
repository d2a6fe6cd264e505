"""Small methods and data for the tests of the training loop; each takes milliseconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.base import Defense
from casemate.fields import spec
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task, Trainable, Update
from casemate.training.loop import Trained, train
from casemate.training.recipe import Recipe

SHAPE, CLASSES = (1, 4, 4), 3
SGD = {"lr": 0.1, "momentum": 0.0, "batch_size": 10, "epochs": 1, "precision": "fp32"}


def recipe(**changes: Any) -> Recipe:
    """Plain SGD at 0.1, batches of 10, one epoch."""
    return Recipe(**{**SGD, **changes})


def data(n: int = 40, seed: int = 0) -> DeviceData:
    """Images whose class is written into their first three pixels."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    images = draw.integers(0, 100, (n, *SHAPE[1:], SHAPE[0]), dtype=np.uint8)
    images[np.arange(n), 0, labels, 0] = 255
    return DeviceData(Images(images, labels))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))


def batch_norm_net() -> nn.Module:
    """Everything a checkpoint can forget: batch norm, dropout, weights in another memory format."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def task(made: Recipe, network: Callable[[], nn.Module] = linear, **changes: Any) -> Task:
    return Task(SHAPE, CLASSES, ThreatModel("linf", 0.1), network=network, player=made.player, **changes)


def run(method: Trainable, made: Recipe, *, network: Callable[[], nn.Module] = linear, **changes: Any) -> Trained:
    """Train on the toy data, seed 0, on the CPU."""
    given: dict[str, Any] = {"seed": 0, "device": "cpu", **changes}
    of_task = given.pop("task", None) or task(made, network)
    samples = given.pop("samples", None) or data()
    return train(method, of_task, samples, given.pop("val_data", None), made, **given)


def weights(trained: Trained, name: str = "classifier") -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in trained.modules[name].state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@spec
class Plain(Defense):
    """Cross-entropy on clean images."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        yield Update(("classifier",), lambda: F.cross_entropy(ctx.modules["classifier"](x), y))


@spec
class Noisy(Defense):
    """Uses all that a resumed run must find again: drawn noise, the global generator, state, draws, logs."""

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        self.die(ctx)
        noise = torch.randn(x.shape, generator=ctx.rng) * 0.1 + torch.rand_like(x) * 0.1
        carried = ctx.state.setdefault("carried", torch.zeros(SHAPE).requires_grad_())
        more, labels = ctx.draw(len(x), y)
        x, y = torch.cat([x + noise + carried.detach(), more]), torch.cat([y, labels])

        def loss() -> Tensor:
            value = F.cross_entropy(ctx.modules["classifier"](x), y)
            ctx.log(doubled=2 * value, step=ctx.step)
            return value

        yield Update(("classifier",), loss)
        with torch.no_grad():
            carried.mul_(0.9).add_(noise[0])

    def die(self, ctx: Context) -> None:
        if os.environ.get("TOY_DIES_AT") == str(ctx.step):
            os.kill(os.getpid(), signal.SIGKILL)


class Learned(Trainable):
    """An attack that learns: one universal perturbation against the frozen victim."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        class Universal(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.delta = nn.Parameter(torch.zeros(SHAPE))

            def forward(self, x: Tensor) -> Tensor:
                return (x + self.delta).clamp(0, 1)

        return {"generator": Universal()}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        delta = modules["generator"].delta
        assert isinstance(delta, nn.Parameter)

        def project() -> None:
            delta.data.clamp_(-task.threat.radius, task.threat.radius)

        return {"generator": task.player([delta], after_step=project)}

    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        assert ctx.victim is not None
        victim = ctx.victim
        yield Update(("generator",), lambda: -F.cross_entropy(victim(ctx.modules["generator"](x)), y))
