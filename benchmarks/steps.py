"""What the benchmarks of training share: the time of each step of the real loop, executed FLOPs, the machine's own
ceiling, and the same step as it is usually written."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.networks.base import build_network
from casemate.threat import ThreatModel
from casemate.trainable import Task, Trainable
from casemate.training.loop import train
from casemate.training.recipe import Recipe

LINF = ThreatModel("linf", 8 / 255)


@dataclass
class Problem:
    """Random images for a network: what a step costs does not depend on what is in them."""

    network: str
    shape: tuple[int, int, int] = (3, 32, 32)
    options: dict[str, Any] = field(default_factory=dict)

    def fresh(self) -> nn.Module:
        return build_network(self.network, input_shape=self.shape, num_classes=10, **self.options)

    def task(self, recipe: Recipe) -> Task:
        return Task(self.shape, 10, LINF, self.fresh, recipe.player)

    def data(self, n: int, device: str) -> DeviceData:
        draw = np.random.default_rng(0)
        channels, height, width = self.shape
        images = draw.integers(0, 256, (n, height, width, channels), dtype=np.uint8)
        return DeviceData(Images(images, draw.integers(0, 10, n)), device, channels_last=True)


class Stamped:
    """Data that notes the time whenever the loop comes for a batch: the steps lie between. It does not come again
    after the last, so that is one more batch than steps that are timed."""

    def __init__(self, data: DeviceData, clock: Callable[[], float]) -> None:
        self.data, self.clock = data, clock
        self.labels = data.labels
        self.stamps: list[float] = []

    def __len__(self) -> int:
        return len(self.data)

    def x(self, indices: Tensor, /) -> Tensor:
        return self.data.x(indices)

    def batches(self, *args: Any, **options: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in self.data.batches(*args, **options):
            self.stamps.append(self.clock())
            yield batch


def step_seconds(method: Trainable, problem: Problem, recipe: Recipe, steps: int, device: str = "cpu") -> list[float]:
    """Seconds of each of `steps` calls of the loop on a batch, replays divided: CPU time of this thread, or on a GPU
    the wall time after it has finished (which keeps the host from running ahead: use `rate` for that)."""

    def clock() -> float:
        if device == "cpu":
            return time.thread_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    data = Stamped(problem.data((steps + 1) * recipe.batch_size, device), clock)
    replays = method.updates_per_batch
    run = replace(recipe, epochs=float(replays), validate_every=0)
    train(method, problem.task(run), data, None, run, seed=0, device=device)
    return [(after - before) / replays for before, after in zip(data.stamps, data.stamps[1:], strict=False)]


def rate(method: Trainable, problem: Problem, recipe: Recipe, warm: int, steps: int, device: str) -> float:
    """Seconds of a step, the mean over `steps` after `warm` others, with the host free to run ahead."""
    at: list[float] = []

    def clock() -> float:
        at.append(0.0)
        if device == "cuda" and len(at) in (warm + 1, warm + steps + 1):
            torch.cuda.synchronize()
        return time.perf_counter()

    data = Stamped(problem.data((warm + steps + 1) * recipe.batch_size, device), clock)
    run = replace(recipe, epochs=1.0, validate_every=0, drop_last=True)
    train(method, problem.task(run), data, None, run, seed=0, device=device)
    return (data.stamps[warm + steps] - data.stamps[warm]) / steps


class Flops(TorchDispatchMode):
    """Counts the floating point operations of products and convolutions, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def step_flops(method: Trainable, problem: Problem, batch: int = 8) -> float:
    """Executed floating point operations of one step per image: products, and convolutions both
    ways. Of the second of three steps, when what only begins a training is over."""
    recipe = Recipe(
        epochs=float(method.updates_per_batch), lr=0.01, batch_size=batch, precision="fp32", validate_every=0
    )
    counter = Flops()
    marks: list[float] = []
    data = Stamped(problem.data(3 * batch, "cpu"), lambda: marks.append(counter.total) or 0.0)
    with counter:
        train(method, problem.task(recipe), data, None, recipe, seed=0, device="cpu")
    return (marks[2] - marks[1]) / batch / method.updates_per_batch


def forward_flops(problem: Problem) -> float:
    """Of one image's forward pass."""
    net, counter = problem.fresh().eval(), Flops()
    with counter, torch.no_grad():
        net(torch.zeros(1, *problem.shape))
    return counter.total


def plain_pgd_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, size: float
) -> float:
    """Adversarial training as it is usually written: the attack through `backward()`, weight gradients and all, the
    network and the images NCHW in float32, the loss read every step."""
    radius = LINF.radius
    delta = torch.empty_like(x).uniform_(-radius, radius)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(steps):
        delta.requires_grad_()
        F.cross_entropy(net(x + delta), y).backward()
        assert delta.grad is not None
        delta = (delta + size * delta.grad.sign()).clamp(-radius, radius).detach()
        delta = (x + delta).clamp(0, 1) - x
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x + delta), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def product_rate(dtype: torch.dtype, side: int, device: str, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product, the best of some rounds: the ceiling that shares are given of."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.thread_time() if device == "cpu" else time.perf_counter()
        for _ in range(1 if device == "cpu" else 10):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        spent = (time.thread_time() if device == "cpu" else time.perf_counter()) - begun
        best = max(best, (1 if device == "cpu" else 10) * 2 * side**3 / spent)
    return best


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, threads and load."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "processor": _processor(), "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "load": [round(value, 2) for value in os.getloadavg()],
        "time": "wall, the GPU waited for" if gpu else "CPU time of one thread; other jobs shared the machine", **gpu,
    }  # fmt: skip


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
