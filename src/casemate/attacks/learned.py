"""Attacks that learn: trained like a defense, by the same loop, against a frozen victim; then used as they are."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from casemate.attacks.base import Attack, Cost
from casemate.errors import UserError
from casemate.networks.base import Shape
from casemate.seeding import generator
from casemate.system import Offer, View, frozen
from casemate.threat import Goal, ThreatModel
from casemate.trainable import Context, Player, Task, Trainable


class LearnedAttack(Trainable):
    """Base of every attack that is fitted to a victim (`ctx.victim`, frozen): a `@spec` class."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    """What the fitted attack needs of the victim."""

    @abstractmethod
    def build(self, input_shape: Shape, num_classes: int) -> dict[str, nn.Module]:
        """Freshly initialised modules by name."""

    @abstractmethod
    def perturb(
        self, modules: dict[str, nn.Module], x: Tensor, goal: Goal, threat: ThreatModel, rng: torch.Generator
    ) -> Tensor:
        """Adversarial images for `x` (N x C x H x W in [0, 1]), inside the budget; differentiable in the modules."""

    def modules(self, task: Task) -> dict[str, nn.Module]:
        return self.build(task.input_shape, task.num_classes)

    def players(self, task: Task, modules: dict[str, nn.Module]) -> dict[str, Player]:
        return {name: task.player(module.parameters()) for name, module in modules.items()}

    def victim(self, ctx: Context) -> nn.Module:
        """The victim. Raises UserError if the run has none."""
        if ctx.victim is None:
            raise UserError(f"{type(self).__name__} is fitted against a victim, and this run has none")
        return ctx.victim


class NeedsWeights(Attack):
    """Base of the registered name of a learned attack: without fields, called only once weights are bound."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})
    binds: ClassVar[Literal["source", "weights"] | None] = "weights"

    def with_weights(
        self, fitted: LearnedAttack, weights: dict[str, Tensor], *, input_shape: Shape, num_classes: int
    ) -> Attack:
        return FittedAttack(fitted, weights, input_shape=input_shape, num_classes=num_classes)

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        raise AssertionError("an attack with `binds` is refused before it runs")


class FittedAttack(Attack):
    """A learned attack with the weights that were fitted to one victim: no further search, and labels suffice.

    Against any other victim it is a transfer attack, and weak. `weights` are named "module.parameter". Raises
    UserError if they are not those of `fitted` for images of that shape.
    """

    def __init__(
        self, fitted: LearnedAttack, weights: dict[str, Tensor], *, input_shape: Shape, num_classes: int
    ) -> None:
        self.fitted, self.weights = fitted, weights
        self.modules = nn.ModuleDict(fitted.build(input_shape, num_classes))
        try:
            self.modules.load_state_dict(weights)
        except RuntimeError as error:
            problem = " ".join(str(error).split())
            raise UserError(
                f"weights do not fit {type(fitted).__name__} for {input_shape} images: {problem}"
            ) from None
        self.needs = fitted.needs  # type: ignore[misc]

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        modules = self.modules.to(x.device)
        with torch.no_grad(), frozen(modules):
            x_adv = self.fitted.perturb(dict(modules.items()), x, goal, threat, generator(seed, "perturb"))
            return threat.project(x_adv, x)

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, 0

    def parameters(self) -> dict[str, Any]:
        return {**asdict(self.fitted), "weights": self.hash()}  # type: ignore[call-overload]

    def hash(self) -> str:
        """Of every fitted tensor."""
        digest = hashlib.sha256()
        for name, value in sorted(self.weights.items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
