"""Attacks that learn: trained like a defense, by the same loop, against a frozen victim; then used as they are.

Each has two classes. A `LearnedAttack` is what is fitted, by the finetune stage: networks and a training step. The
registered attack of the same name, a `NeedsWeights`, says how the fitted networks are used.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost
from casemate.attacks.checks import check_threat
from casemate.attacks.chunk import Chunk
from casemate.errors import UserError
from casemate.fields import Text, spec
from casemate.networks.base import Shape
from casemate.objectives import Objective, cross_entropy
from casemate.system import View, frozen
from casemate.threat import Goal, Norm, ThreatModel
from casemate.trainable import Context, Player, Task, Trainable


class LearnedAttack(Trainable):
    """Base of what is fitted to a victim (`ctx.victim`, frozen): a `@spec` class."""

    norms: ClassVar[frozenset[Norm]] = frozenset({"linf", "l2"})
    """The threat models it can work in."""

    @abstractmethod
    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        """Freshly initialised modules by name."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        check_threat(type(self).__name__, self.norms, task.threat)
        return self.build(task.input_shape, task.num_classes)

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        return {name: task.player(module.parameters()) for name, module in modules.items()}

    def victim(self, ctx: Context) -> nn.Module:
        """The victim. Raises UserError if the run has none."""
        if ctx.victim is None:
            raise UserError(f"{type(self).__name__} is fitted against a victim, and this run has none")
        return ctx.victim


@spec
class NeedsWeights(Attack):
    """Base of the registered name of a learned attack: called only once weights are bound."""

    binds: ClassVar[Literal["source", "weights"] | None] = "weights"
    trainer: ClassVar[type[LearnedAttack]]
    """What its weights come from."""

    generator: Text | None = None
    """The name under `finetune.generators` of the weights to use; by default that of the attack in its suite."""

    @abstractmethod
    def search(
        self, fitted: Any, modules: dict[str, nn.Module], view: View, x: Tensor, goal: Goal, threat: ThreatModel,
        seed: int, cost: Cost,
    ) -> Tensor:  # fmt: skip
        """`Attack.run`, with `fitted` (a `trainer`) and its trained modules, frozen and on the device of `x`."""

    def spends(self, fitted: Any, view: View, n: int) -> tuple[int, int, int]:
        """`Attack.passes` of `search`; nothing unless overridden."""
        return 0, 0, 0

    def with_weights(
        self, fitted: LearnedAttack, weights: dict[str, Tensor], *, input_shape: Shape, num_classes: int
    ) -> Attack:
        if not isinstance(fitted, self.trainer):
            raise UserError(f"attack {type(self).__name__} cannot use the weights of a {type(fitted).__name__}")
        return FittedAttack(self, fitted, weights, input_shape=input_shape, num_classes=num_classes)

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        raise AssertionError("an attack with `binds` is refused before it runs")


class FittedAttack(Attack):
    """A learned attack with the weights that were fitted to one victim.

    Against any other victim it is a transfer attack, and weak. `weights` are named "module.parameter". Raises
    UserError if they are not those of `fitted` for images of that shape.
    """

    def __init__(
        self, attack: NeedsWeights, fitted: LearnedAttack, weights: dict[str, Tensor], *, input_shape: Shape,
        num_classes: int,
    ) -> None:  # fmt: skip
        self.attack, self.fitted, self.weights = attack, fitted, weights
        self.networks = nn.ModuleDict(fitted.build(input_shape, num_classes))
        try:
            self.networks.load_state_dict(weights)
        except RuntimeError as error:
            problem = " ".join(str(error).split())
            raise UserError(
                f"weights do not fit {type(fitted).__name__} for {input_shape} images: {problem}"
            ) from None
        self.needs, self.aimable = attack.needs, attack.aimable  # type: ignore[misc]

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        networks = self.networks.to(x.device)
        with torch.no_grad(), frozen(networks):
            x_adv = self.attack.search(self.fitted, dict(networks.items()), view, x, goal, threat, seed, cost)
            return threat.project(x_adv, x)

    def accept(self, threat: ThreatModel) -> None:
        check_threat(type(self.attack).__name__, self.fitted.norms, threat)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return self.attack.spends(self.fitted, view, n)

    def parameters(self) -> dict[str, Any]:
        use = self.attack.parameters()
        use.pop("generator")  # a name decides nothing
        return {**use, **asdict(self.fitted), "weights": self.hash()}  # type: ignore[call-overload]

    def hash(self) -> str:
        """Of every fitted tensor."""
        digest = hashlib.sha256()
        for name, value in sorted(self.weights.items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


# --- what several of them do ----------------------------------------------------------------------------------


def slope(
    logits: Callable[[Tensor], Tensor], x: Tensor, goal: Goal, objective: Objective = cross_entropy
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits N x classes, values (N,), input gradients N x C x H x W) at `x`, all without a graph. One pass.

    The values are summed, so that no image's gradient depends on how many others there are.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = logits(leaf).float()
        values = objective(out, goal)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return out.detach(), values.detach(), gradient


def look(chunk: Chunk, rows: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, gradients of the chunk's score) at one image for each of `rows`; paid as one pass of the view."""
    logits, _, gradient = slope(chunk.view.logits, x_adv, chunk.goal[rows], chunk.score)
    chunk.pay(rows, forwards=1, backwards=1)
    return logits, gradient


def offer(chunk: Chunk, rows: Tensor, x_adv: Tensor, logits: Tensor) -> None:
    """Judge one image for each of `rows` by what the view has answered."""
    chunk.offer(rows, x_adv, logits, chunk.hit(chunk.goal[rows], logits, x_adv))


def conclude(chunk: Chunk, rows: Tensor, x_adv: Tensor, *, last: bool, rivals: bool = True) -> None:
    """The end of one draw: its images are judged by a query, unless there is nothing to learn from it.

    `last`: no draw follows, so on an exact view the verification of the result judges them. `rivals`: whether there
    are other candidates that they compete with.
    """
    if (last and chunk.view.exact) or not rivals:
        chunk.out[rows] = x_adv
        return
    logits = chunk.query(x_adv)
    chunk.pay(rows, queries=1)
    offer(chunk, rows, x_adv, logits)


def concluding_queries(view: View, draws: int, rivals: bool = True) -> int:
    """Most queries per image that `conclude` makes over `draws` draws."""
    if not rivals and draws == 1:
        return 0
    return draws - 1 if view.exact else draws
