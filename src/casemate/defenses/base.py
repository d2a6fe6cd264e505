"""The defense contract: a `Trainable` that also says how the trained thing is used at inference."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from casemate.errors import UserError, near
from casemate.networks.base import Shape
from casemate.system import System, TorchSystem
from casemate.threat import ThreatModel
from casemate.trainable import Player, Task, Trainable


class Defense(Trainable):
    """Base of every defense: a `@spec` class in `defenses/<its registered name>.py`."""

    inference_modes: ClassVar[tuple[str, ...]] = ("plain",)
    """Ways to use the trained modules, the primary one first. "plain" is the classifier alone."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        return {"classifier": task.network()}

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        return {"classifier": task.player(modules["classifier"].parameters())}

    def system(
        self, modules: dict[str, nn.Module], mode: str, *, input_shape: Shape, num_classes: int, threat: ThreatModel
    ) -> System:
        """What is deployed in `mode`, one of `inference_modes`. `threat` is the one it was trained for."""
        self.require_mode(mode)
        return TorchSystem(modules["classifier"], input_shape=input_shape, num_classes=num_classes, name=mode)

    def require_mode(self, mode: str) -> None:
        """Raise UserError unless `mode` is one of `inference_modes`."""
        if mode not in self.inference_modes:
            raise UserError(f"{type(self).__name__} has no inference mode {mode!r}{near(mode, self.inference_modes)}")
