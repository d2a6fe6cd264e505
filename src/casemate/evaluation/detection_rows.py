"""What one detector says of natural and of attacked images, and the rows of the detection table made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from casemate.detectors.fitting import DetectorSpec, Regression, Scorer, scores_of
from casemate.errors import UserError
from casemate.evaluation.detection import Judged, figures, mean_and_deviation
from casemate.networks.base import Classifier


@dataclass(frozen=True)
class Set2:
    """What one fit says of set II; `adversarial` by scope, `noise` natural images moved as far as those of "all"."""

    natural: Judged
    adversarial: dict[str, Judged]
    noise: Judged
    threshold: float


class Seen:
    """The scores of one detector's images, worked out once for all fits and splits."""

    def __init__(
        self, classifier: Classifier, scorer: Scorer, x: Tensor, y: Tensor,
        made: Mapping[str, Tensor], noise: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.y = y
        self.moved = {name: (found != x).flatten(1).any(1) for name, found in made.items()}
        self.natural = scores_of(scorer, classifier, x, x)
        self.made = {name: scores_of(scorer, classifier, found, x) for name, found in made.items()}
        self.noise = {name: scores_of(scorer, classifier, found, x) for name, found in noise.items()}

    def fitting(self, attack: str, first: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of set I: natural, adversarial."""
        changed = first[self.moved[attack][first]]
        if not len(changed):
            raise UserError(f"attack {attack} changed none of the {len(first)} images of set I: nothing to detect")
        return self.natural[0][first], self.made[attack][0][changed]

    def judged(self, attack: str, fit: Regression, second: Tensor) -> Set2:
        changed = second[self.moved[attack][second]]
        fooled = changed[(self.natural[1] == self.y)[changed] & (self.made[attack][1] != self.y)[changed]]

        def of(scored: tuple[Tensor, Tensor], rows: Tensor) -> Judged:
            right = (scored[1] == self.y)[rows]
            return Judged(fit(scored[0][rows]).double().cpu().numpy(), right.cpu().numpy())

        adversarial = {"all": of(self.made[attack], changed), "successes": of(self.made[attack], fooled)}
        noise = of(self.noise[attack], changed)
        return Set2(of(self.natural, second), adversarial, noise, float(fit.threshold))


def rows_of(each: Sequence[Set2], spec: DetectorSpec) -> list[dict[str, Any]]:
    """A row for each threshold and scope, over the splits."""
    rows = []
    thresholds = {"half"} if spec.threshold == "half" else {"half", "validation"}
    for threshold in sorted(thresholds):
        for scope in ("all", "successes"):
            figured = []
            for found in each:
                at = 0.0 if threshold == "half" else found.threshold
                if len(found.adversarial[scope].odds):
                    alarms = float((found.noise.odds > at).mean())
                    figured.append(
                        {**figures(found.natural, found.adversarial[scope], at), "noisy_false_alarms": alarms}
                    )
            if figured:
                named = {"threshold": threshold, "own": threshold == spec.threshold, "scope": scope}
                rows.append({**named, **mean_and_deviation(figured)})
    return rows
