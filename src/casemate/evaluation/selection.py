"""What chooses a champion: one suite on images of the validation split, which no figure of a report is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from casemate.evaluation.images import EvaluationSet
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import Planned, Runner
from casemate.evaluation.schema import EvaluateParams
from casemate.evaluation.worst import worst_cases
from casemate.system import System


@dataclass(frozen=True)
class HeldOut:
    """Runs the suite of `params.selection` on the images of `runner`."""

    runner: Runner
    params: EvaluateParams

    @classmethod
    def of(cls, images: EvaluationSet | None, runner: Runner, params: EvaluateParams) -> HeldOut | None:
        """With the settings of the runner of the test images; None where there are no images, or nothing is asked."""
        if not images or params.selection is None:
            return None
        return cls(replace(runner, data=images, keep=0), params)

    @property
    def suite(self) -> str:
        """The suite that chooses."""
        asked = self.params.selection
        return (asked.suite if asked else None) or next(iter(self.params.suites))

    def cells(self, tested: Sequence[Planned]) -> list[Planned]:
        """Of the cells that are run on test images those of the suite, on at most as many images as there."""
        assert self.params.selection is not None
        most = min(self.params.selection.images, len(self.runner.data))
        return [replace(c, images=min(most, c.images)) for c in tested if c.suite == self.suite]

    def finish(self, system: System, cells: Sequence[Planned], row: str) -> list[Finished]:
        """Run what the ledger does not hold."""
        return [Finished(c, self.runner.finish(system, c, row=f"{row} (validation)")) for c in cells]

    def entry(self, system: System, cells: Sequence[Planned], row: str) -> dict[str, Any] | None:
        """{"suite", "accuracy", "low", "high", "n", ...}: the adaptive worst case; None if no attack can run."""
        done = self.finish(system, cells, row)
        worst = worst_cases(system, done, self.runner.threat)["all"]["adaptive"] if done else None
        return None if worst is None else {"suite": self.suite, **worst}
