"""Every registered defense at toy size, for what must hold of all of them: one that is new is in it by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import training_toys
from torch import Tensor

from casemate import registry
from casemate.data.base import Images
from casemate.data.device import DeviceData
from casemate.defenses.base import Defense
from casemate.fields import spec
from casemate.networks.base import Classifier, build_network
from casemate.threat import ThreatModel
from casemate.trainable import Context, Task, Trainable, Update
from casemate.training.loop import Trained
from casemate.training.recipe import Recipe

SHAPE, CLASSES = (1, 12, 12), 3

SMALL: dict[str, Any] = {
    "steps": 2, "samples": 2, "latent_steps": 2, "replays": 2, "width": 2, "decoder_width": 2, "encoder_width": 2,
    "z_dim": 2, "latent": 3, "critic_width": 1, "critic_depth": 10, "dictionary": 2, "scales": 1, "coarsest": 11,
    "critic_steps": 1, "generator_steps": 1, "warmup": 0.0,
}  # fmt: skip
"""Values of options that cost time, for whichever defense has an option of that name (and of that type)."""


def toy(name: str) -> Defense:
    """The registered defense with `SMALL` options and else its defaults."""
    kind: type[Defense] = registry.resolve("defense", name)
    defaults = {f.name: f.default for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in SMALL.items() if fits(defaults.get(key), value)})


def fits(default: Any, value: Any) -> bool:
    """Whether an option with that default can be made as small as `value`."""
    return default is not None and type(default) is type(value) and value < default


def network() -> Classifier:
    """An encoder with batch norms and a head: every defense can train it."""
    return build_network("er_conv", input_shape=SHAPE, num_classes=CLASSES, dim=4, code=3, hidden=(8, 8))


def data(n: int = 24) -> DeviceData:
    """Images whose class is a bright column."""
    labels = np.arange(n) % CLASSES
    images = np.random.default_rng(0).integers(50, 150, (n, *SHAPE[1:], 1), dtype=np.uint8)
    images[np.arange(n), :, 4 * labels] = 220
    return DeviceData(Images(images, labels))


def run(method: Trainable, made: Recipe, **changes: Any) -> Trained:
    """Train `network` on `data`, seed 0, on the CPU."""
    task = Task(SHAPE, CLASSES, ThreatModel("linf", 0.1), network=network, player=made.player)
    return training_toys.run(method, made, **{"task": task, "samples": data(), **changes})


class Died(Exception):
    """The run was cut off."""


def many_players() -> Defense:
    """The registered defense that trains most modules side by side, at toy size."""
    task = Task(SHAPE, CLASSES, ThreatModel("linf", 0.1), network=network, player=training_toys.recipe().player)
    made = [toy(name) for name in registry.names("defense") if name != "given"]
    return max(made, key=lambda method: len(method.modules(task)))


def die() -> None:
    raise Died


def mortal(method: Defense, at: int, end: Callable[[], None] = die) -> Defense:
    """`method` with a step that ends in the middle, after its first update, the first time that step `at` comes."""
    alive = [at]
    kind = type(method)

    @spec
    class Mortal(kind):  # type: ignore[misc, valid-type]
        def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
            for update in kind.step(self, ctx, x, y):
                yield update
                if alive and ctx.step == alive[0]:
                    alive.clear()
                    end()

    return Mortal(**asdict(method))  # type: ignore[call-overload, no-any-return]
