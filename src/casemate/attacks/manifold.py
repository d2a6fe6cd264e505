"""The overpowered attack on a projection onto a generator's range: adversarial images that lie in that range.

Athalye et al. 2018 (obfuscated-gradients, Defense-GAN): search the generator's own codes, so that a perfect
projection would return what is found unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from casemate.attacks.adaptive import KNOWS
from casemate.attacks.base import Attack, Cost
from casemate.attacks.carlini_wagner import Weight
from casemate.attacks.minimise import Judge, Live, Parametrisation, Task, minimise
from casemate.attacks.optimizers import Adam
from casemate.errors import UserError
from casemate.fields import Count, NonNegative, Positive, spec
from casemate.objectives import margin
from casemate.seeding import generator as seeded
from casemate.system import Offer, View
from casemate.threat import Goal, ThreatModel


@dataclass
class OnManifold(Parametrisation):
    """x' = G(z)."""

    generator: nn.Module
    first: Tensor
    """Where the search starts (N x latent)."""

    def start(self, x: Tensor) -> Tensor:
        return self.first

    def image(self, variables: Tensor, live: Live, step: int) -> Tensor:
        made: Tensor = self.generator(variables)
        return made


@spec
class Manifold(Attack):
    """The nearest G(z) that the classifier gets wrong: min ||G(z) - x||^2 + c max(0, kappa - margin) over z by Adam.

    The search starts at the best of `starts` inversions of the image; c is found for each image by bisection, each
    round beginning anew. The nearest success of all rounds on the classifier alone is kept (the authors' code keeps
    the last), and the deployed system judges it: where its descent finds another code, a `kappa` helps. The passes it
    counts are those of the classifier; an inversion is `starts` x `inversion_steps` passes of the generator alone.
    """

    needs: ClassVar[frozenset[Offer]] = KNOWS
    minimum_norm: ClassVar[bool] = True

    starts: Count = 30
    inversion_steps: Count = 3000
    steps: Count = 30000
    rounds: Count = 5
    rate: Positive = 0.1
    first_weight: Positive = 1.0
    kappa: NonNegative = 0.0

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        generator = _generator(view)
        assert view.system is not None
        face = replace(view.system.views()["static"], exact=False)
        task = Task(
            OnManifold(generator, self.invert(generator, x, seed)), Adam(self.rate), self._objective, self._nearest(),
            self.steps,
        )  # fmt: skip
        best, kept = x.new_full((len(x),), torch.inf), x.clone()
        weight = Weight.first(best, self.first_weight)
        for _ in range(self.rounds):
            found = minimise(task, face, x, goal, cost, {"weight": weight.value})
            better = found.score < best
            best = torch.where(better, found.score, best)
            kept = torch.where(better.view(-1, 1, 1, 1), found.x_adv, kept)
            weight.search(found.score < torch.inf)
        return kept

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        looks = n * self.steps * self.rounds
        return looks, looks, 0

    def invert(self, generator: nn.Module, x: Tensor, seed: int) -> Tensor:
        """The codes (N x latent) whose images are nearest to `x`, of `starts` searches from N(0, I)."""
        draws = torch.randn(self.starts, int(generator.latent), generator=seeded(seed, "inversion")).to(x)  # type: ignore[arg-type]
        best, found = x.new_full((len(x),), torch.inf), draws[:1].repeat(len(x), 1)
        for draw in draws:
            z = draw.repeat(len(x), 1)
            state = Adam(self.rate).begin(z)
            for _ in range(self.inversion_steps):
                z = z.detach().requires_grad_()
                errors = _squared(generator(z), x)
                (slope,) = torch.autograd.grad(errors.sum(), z)
                z = state.step(z.detach(), errors.detach(), slope)
            with torch.no_grad():
                errors = _squared(generator(z), x)
            found = torch.where((errors < best)[:, None], z, found)
            best = torch.minimum(best, errors)
        return found

    def _objective(self, logits: Tensor, x_adv: Tensor, live: Live) -> Tensor:
        hinge = (self.kappa - margin(logits, live.goal)).clamp(min=0)
        return _squared(x_adv, live.x) + live.own["weight"] * hinge

    def _nearest(self) -> Judge:
        def judge(logits: Tensor, x_adv: Tensor, values: Tensor, live: Live) -> Tensor:
            hit = live.goal.reached(logits.argmax(1)) & (margin(logits, live.goal) >= self.kappa)
            return _squared(x_adv, live.x).masked_fill(~hit, torch.inf)

        return judge


def _generator(view: View) -> nn.Module:
    """G of the projection before the view's system. Raises UserError if there is none."""
    found = getattr(None if view.system is None else view.system.purification, "generator", None)
    if not isinstance(found, nn.Module):
        raise UserError("attack Manifold is on a projection onto a generator's range, and the system has none")
    return found


def _squared(made: Tensor, x: Tensor) -> Tensor:
    errors: Tensor = (made - x).square().flatten(1).sum(1)
    return errors
