"""A small encoder on 8x8 images, stepped by the loop's own `Updates` with the loop's own optimizers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import training_toys
from stepping import Probe
from torch import Tensor, nn

from casemate.defenses.base import Defense
from casemate.networks.base import Classifier, build_network
from casemate.networks.encoders import encoder_parameters
from casemate.seeding import generator
from casemate.threat import ThreatModel
from casemate.trainable import Context, Player, Task
from casemate.training.loop import Trained
from casemate.training.recipe import Recipe
from casemate.training.recorder import ListRecorder
from casemate.training.updates import Updates

LINF = ThreatModel("linf", 0.1)
SHAPE, CLASSES = (1, 8, 8), 4


def network(**options: Any) -> Classifier:
    torch.manual_seed(0)
    small: dict[str, Any] = {"dim": 4, "code": 3, "hidden": (12, 8), **options}
    return build_network("er_conv", input_shape=SHAPE, num_classes=CLASSES, **small)


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    """Images well inside [0, 1], whose class is a bright column, and labels."""
    y = torch.arange(n) % CLASSES
    x = 0.3 + 0.2 * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    for i, label in enumerate(y.tolist()):
        x[i, :, :, 2 * label] += 0.3
    return x, y


@dataclass
class Bench:
    """A defense stepped as the loop steps it, gradients that add up included."""

    defense: Defense
    threat: ThreatModel = LINF
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=1, lr=0.01, optimizer="adam", precision="fp32"))
    network: Any = network
    modules: dict[str, nn.Module] = field(init=False)
    players: dict[str, Player] = field(init=False)
    ctx: Context = field(init=False)

    def __post_init__(self) -> None:
        made = self.network()
        task = Task(made.input_shape, made.num_classes, self.threat, lambda: made, self.recipe.player)
        torch.manual_seed(0)
        self.modules = self.defense.modules(task)
        self.players = self.defense.players(task, self.modules)
        self.updates = Updates(self.players, "fp32", torch.device("cpu"))
        self.ctx = Context(self.modules, self.threat)

    @property
    def f(self) -> Classifier:
        made = self.modules["classifier"]
        assert isinstance(made, Classifier)
        return made

    def encoder(self) -> list[Tensor]:
        return [p.detach().clone() for p in encoder_parameters(self.f)]

    def part(self, name: str) -> list[Tensor]:
        module = self.f.head if name == "head" else self.modules[name]
        return [p.detach().clone() for p in module.parameters()]

    def stepping(self, x: Tensor, y: Tensor, *, fraction: float = 0.0, epoch: int = 0) -> Any:
        """After each update, its players."""
        for module in self.modules.values():
            module.train()
        self.ctx.fraction, self.ctx.epoch, self.ctx.rng = fraction, epoch, generator("step", self.ctx.step)
        self.updates.begin(fraction)
        for update in self.defense.step(self.ctx, x, y):
            self.updates.apply(update, self.ctx.step)
            yield update.players
        self.ctx.step += 1

    def step(self, x: Tensor, y: Tensor, **at: Any) -> list[tuple[tuple[str, ...], float]]:
        """One batch: (players, loss) of every update."""
        done = list(self.stepping(x, y, **at))
        losses = [float(loss) for _, _, loss in self.updates.pending[-len(done) :]]
        return list(zip(done, losses, strict=True))


def first_layer(bench: Bench) -> Probe:
    """Passes through the encoder, whatever reads its code."""
    return Probe(bench.f.body["conv1"])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


class BreaksOff(ListRecorder):
    """Ends a run after its second epoch, before that is saved."""

    def metrics(self, values: Any, step: int = 0) -> None:
        if step == 2:
            raise InterruptedError


def straight_and_resumed(method: Defense, folder: Path, **options: Any) -> tuple[Trained, Trained]:
    """Three epochs on the toy data in one piece, and with a break in the second."""

    def tiny() -> Classifier:
        small: dict[str, Any] = {"dim": 4, "code": 3, "hidden": (8, 8), **options}
        return build_network("er_conv", input_shape=(1, 4, 4), num_classes=3, **small)

    made = training_toys.recipe(epochs=3, optimizer="adam", lr=0.01)
    straight = training_toys.run(method, made, network=tiny)
    with contextlib.suppress(InterruptedError):
        training_toys.run(method, made, network=tiny, checkpoints=folder, recorder=BreaksOff())
    assert list(folder.iterdir()), "nothing to resume from"
    return straight, training_toys.run(method, made, network=tiny, checkpoints=folder)
