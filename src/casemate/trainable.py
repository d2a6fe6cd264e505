"""What the training loop runs: a method that yields `Update`s. The loop knows no method by name.

A defense and an attack that learns are both `Trainable`s: frozen specifications with the same players and step.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from casemate.threat import ThreatModel

Precision = Literal["auto", "fp32", "bf16"]
T = TypeVar("T")


class Moment(float):
    """A fraction of the budget that remembers how it was used, so that the loop knows for how long a step that it
    has captured may be repeated. Comparisons are remembered; other arithmetic only inside `depends`."""

    def __init__(self, value: float) -> None:
        self.guards: list[tuple[Callable[[float], Any], Any]] = []
        self.loose = False
        """Used in a way that nothing is known about: another fraction may give another step."""

    def depends(self, value: Callable[[float], T]) -> T:
        """What `value` says at this fraction; the step is another one where it says something else."""
        found = value(float.__add__(self, 0.0))
        self.guards.append((value, found))
        return found

    def holds(self, fraction: float) -> bool:
        """Whether a step at that fraction is the same in all that was asked of this one."""
        return not self.loose and all(value(fraction) == found for value, found in self.guards)


def _remembered(compare: Callable[[Any, Any], Any]) -> Callable[[Moment, Any], Any]:
    return lambda moment, other: moment.depends(lambda at: compare(at, other))


def _loosened(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def method(moment: Moment, *others: Any) -> Any:
        moment.loose = True
        return plain(moment, *others)

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Moment, f"__{_name}__", _remembered(getattr(operator, _name)))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "divmod"):
    setattr(Moment, f"__{_name}__", _loosened(f"__{_name}__"))
    setattr(Moment, f"__r{_name}__", _loosened(f"__r{_name}__"))
for _name in ("abs", "neg", "pos", "bool", "int", "float", "round", "hash", "str", "repr", "format"):
    if f"__{_name}__" in float.__dict__:
        setattr(Moment, f"__{_name}__", _loosened(f"__{_name}__"))


def depends(fraction: float, value: Callable[[float], T]) -> T:
    """`value(fraction)`. The way to make something out of `Context.fraction` that seldom changes, such as a radius
    that has stopped growing: a step that reads the fraction in no other way can be repeated as a CUDA graph."""
    return fraction.depends(value) if isinstance(fraction, Moment) else value(fraction)


@dataclass
class Player:
    """Parameters that one optimizer moves. They may be part of a module."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[float], float] | None = None
    """Factor on the initial learning rate as a function of the fraction of the budget in [0, 1]."""
    max_grad_norm: float | None = None
    after_step: Callable[[], None] | None = None
    """Called after each optimizer step, e.g. weight clipping."""
    precision: Precision = "auto"


@dataclass(frozen=True)
class Update:
    """One optimisation step of the named players on `loss()`; nobody else receives or pays for a gradient."""

    players: tuple[str, ...]
    loss: Callable[[], Tensor]
    """A scalar, evaluated under autocast in the precision of the players."""
    extra_leaves: tuple[Tensor, ...] = ()
    """Further leaves that receive a gradient in the same backward pass (free-m's noise)."""
    zero_grad: bool = True
    """False adds to the gradients of the step's earlier updates; every step begins with none."""


@dataclass(frozen=True)
class Task:
    """What a method is given to build itself: the data's shape, the network and optimizer of the recipe."""

    input_shape: tuple[int, int, int]
    num_classes: int
    threat: ThreatModel
    network: Callable[[], nn.Module]
    """A freshly initialised classifier of the recipe's network."""
    player: Callable[..., Player]
    """`player(parameters, **changes)`: a Player with the recipe's optimizer, schedule and clipping. `changes` are
    fields of the recipe, or `lr_scale`, `betas`, `after_step`: see `casemate.training.recipe.Recipe.player`."""
    seed: int = 0
    steps: int = 0
    """Length of the budget: calls of `step`, replays of a batch included."""
    victim: nn.Module | None = None
    """For an attack that learns: the frozen classifier it is fitted against."""
    victim_system: Any = None


def _to_nobody(text: str) -> None:
    pass


def _no_draw(n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no training data to draw from")


@dataclass
class Context:
    """What a step may use besides its batch. The loop owns it."""

    modules: dict[str, nn.Module]
    threat: ThreatModel
    step: int = 0
    epoch: int = 0
    fraction: float = 0.0
    """Share of the budget already spent, in [0, 1). Compare it, or go through `depends`."""
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Index of each sample of the batch in the training set."""
    rng: torch.Generator = field(default_factory=torch.Generator)
    """Seeded anew for every step, so a resumed run draws what an uninterrupted one would."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """The method's own tensors; checkpointed."""
    draw: Callable[..., tuple[Tensor, Tensor]] = _no_draw
    """`draw(n, labels=None)`: n further training images (of the given labels) and their labels; augmented in a
    step as the batch is, and not in `epoch_end`."""
    logs: dict[str, Tensor] = field(default_factory=dict)
    stop: bool = False
    """Set in `epoch_end` to end training early."""
    keep: bool = False
    """Set in `epoch_end`: weights to fall back on. A run that `stop` ends gives those last kept, if any (or the best,
    where the recipe selects it); the loop takes the mark back for the next epoch."""
    note: Callable[[str], None] = _to_nobody
    """Say one line to whoever watches the run."""
    perturbed: bool = False
    """The recipe's `awp` is at work: a loss of the classifier's is evaluated twice, at other weights than the step
    began with, so it must make its graph itself, and not take one from an earlier update."""
    victim: nn.Module | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """`with ctx.autocast():` is for crafting in the precision of the run; the loop does it for `Update.loss`."""

    def log(self, **values: Tensor | float) -> None:
        """Named scalars, averaged over the epoch on the device, so that logging never waits for it. A mean that is
        not finite is left out of its epoch's row.

        Each update's loss is logged already: as `loss` where the first player takes part, else `loss_<players>`.
        A method that logs one of these names replaces the loop's.
        """
        for key, value in values.items():
            self.logs[key] = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))


class Trainable(ABC):
    """A frozen specification that can be trained. Subclasses are `@spec` classes."""

    batch_coupled: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    """False if what a step does next depends on values on the device: it then never becomes a CUDA graph."""

    @property
    def updates_per_batch(self) -> int:
        """Calls of `step` on each batch (free-m's replays). The budget counts every call, so there are as many fewer
        passes over the data."""
        return 1

    @abstractmethod
    def modules(self, task: Task) -> dict[str, nn.Module]:
        """Fresh modules by name; a defense always has "classifier"."""

    @abstractmethod
    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        """Who learns, and how."""

    @abstractmethod
    def step(self, ctx: Context, x: Tensor, y: Tensor) -> Iterator[Update]:
        """One batch: images in [0, 1], labels (N,) long. Reads like the paper's algorithm."""

    def epoch_end(self, ctx: Context, validate: Callable[[], dict[str, float]]) -> None:  # noqa: B027
        """After each epoch; `validate()` gives clean and robust accuracy on the validation split."""
