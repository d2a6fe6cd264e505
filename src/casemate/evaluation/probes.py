"""Attacks that the evaluation itself needs: no attack at all, and random corners of the ball."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from casemate.attacks.base import Attack, Cost
from casemate.fields import Count, spec
from casemate.seeding import generator
from casemate.system import Offer, View
from casemate.threat import Goal, ThreatModel


@spec
class Identity(Attack):
    """The clean image: what makes every worst case at most the clean accuracy."""

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})

    def accept(self, threat: ThreatModel) -> None:
        """Any: a radius of 0 is what it means."""

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        return x.clone()

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, 0


@spec
class RandomCorners(Attack):
    """`tries` random corners of the linf ball (or points at the full radius in l2), the first that succeeds kept.

    Needs labels only. An image that falls here and to no gradient attack says that the gradients mislead
    (ATTACKS: Athalye, Carlini, Wagner 2018, "random sampling finds adversarial examples").
    """

    needs: ClassVar[frozenset[Offer]] = frozenset({"labels"})

    tries: Count = 100

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        rng = generator("corners", seed)
        found = x.clone()
        active = torch.arange(len(x), device=x.device)
        for _ in range(self.tries):
            noise = torch.randn(x.shape, generator=rng).to(x.device)  # for all, so that no image depends on another
            if not len(active):
                break
            tried = _at_radius(x[active], noise[active], threat)
            hit = goal[active].reached(view.decide(tried))
            cost.queries[active.cpu()] += 1
            found[active] = tried
            active = active[~hit]
        return found

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        return 0, 0, n * self.tries


def _at_radius(x: Tensor, noise: Tensor, threat: ThreatModel) -> Tensor:
    """A point on the ball's surface in the direction of the noise (its sign in linf), cut to the box."""
    if threat.norm == "linf":
        return threat.project(x + threat.radius * noise.sign(), x)
    length = noise.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return threat.project(x + threat.radius * noise / length, x)
