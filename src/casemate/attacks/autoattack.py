"""AutoAttack, version "standard" (Croce & Hein 2020): four attacks without a parameter to choose, each on what
the ones before it have left."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import Tensor

from casemate.attacks import diagnostics, fab, square
from casemate.attacks.apgd import Climb, climb_targets
from casemate.attacks.base import Attack, Cost
from casemate.attacks.chunk import Chunk
from casemate.fields import Count, Flag, spec
from casemate.objectives import cross_entropy
from casemate.system import View
from casemate.threat import Goal, ThreatModel


@spec
class AutoAttack(Attack):
    """APGD on cross-entropy, APGD-T, FAB-T and Square, in this order, in linf and l2.

    On an exact view an image is wrong from the start, or pays until it falls; one that stands has then cost 1,000
    forwards with gradient (101 looks of the first, of which one is a query; 909 of the second, of which 9), 900 steps
    of FAB-T with a query each, 5,001 queries of Square, and a query for the clean image. It is left with the iterate
    of the highest margin. On any other view every image meets every attack to its end.

    `version` "screen" is the first two attacks alone, about a fifth of the work. Its figure is an upper bound, and
    labelled as one: Square may find what gradients do not show.
    """

    version: Literal["standard", "screen"] = "standard"
    steps: Count = 100
    """Of every run of APGD and FAB-T."""
    targets: Count = 9
    """Classes that APGD-T and FAB-T aim at."""
    queries: Count = 5000
    """Of Square, beside the one for its start."""
    diagnose: Flag = True
    """Look for signs that the figure misleads, and warn: six queries more for each image at most."""
    check_every: Count = 1
    """Steps between two looks at which images have fallen; larger saves waiting for a GPU, never changes a result."""

    @property
    def upper_bound(self) -> bool:
        return self.version == "screen"

    def run(self, view: View, x: Tensor, goal: Goal, threat: ThreatModel, seed: int, cost: Cost) -> Tensor:
        chunk = Chunk(view, x, goal, threat, seed, cost)
        clean = chunk.look_at_clean()
        self._warn(self._before(chunk, clean))
        Climb(chunk, cross_entropy, self.steps, ("apgd",), check_every=self.check_every).run()
        silent = climb_targets(
            chunk, clean, steps=self.steps, targets=self.targets, check_every=self.check_every
        )  # fmt: skip
        self._warn(diagnostics.silent_gradients(len(set(silent.tolist())), len(x)))
        if self.version == "standard":
            fab.Search(chunk, clean, self.steps, self.check_every).run(self.targets, restarts=1)
            left = int(chunk.standing.sum())
            square.Search(chunk, self.queries).run()
            self._warn(diagnostics.square_improves(left, int(chunk.standing.sum()), len(x)))
        return chunk.out

    def passes(self, view: View, n: int) -> tuple[int, int, int]:
        runs, looks = n * (1 + self.targets), n * (1 + self.diagnose * (diagnostics.DRAWS + 1))
        steps, queries = runs * self.steps, runs + looks
        if self.version == "standard":
            steps += n * self.targets * self.steps
            queries += n * (self.targets * self.steps + 1 + self.queries)
        return steps * view.passes[0], steps * view.passes[1], queries

    def _before(self, chunk: Chunk, clean: Tensor) -> list[str]:
        if not self.diagnose:
            return []
        everyone = chunk.goal.labels.new_ones(len(chunk.x)).nonzero()[:, 0]
        chunk.pay(everyone, queries=diagnostics.DRAWS)
        chunk.pay(everyone[:1], queries=1)
        return diagnostics.before_attack(chunk.view, chunk.x, chunk.goal, clean)

    def _warn(self, lines: list[str]) -> None:
        for line in lines if self.diagnose else []:
            warnings.warn(line, diagnostics.AttackWarning, stacklevel=4)
