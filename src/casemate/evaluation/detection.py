"""What a detector is worth: the figures of the ER paper, and those it leaves out. No torch is imported here.

N adversarial and M natural images; positive = flagged as adversarial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from casemate.errors import UserError


@dataclass(frozen=True)
class Judged:
    """What a classifier and its detector say of a set of images."""

    odds: np.ndarray
    """(N,) log odds of "adversarial"."""
    right: np.ndarray
    """(N,) bool: the classifier's label is the true one."""

    def __getitem__(self, index: np.ndarray) -> Judged:
        return Judged(self.odds[index], self.right[index])


def figures(natural: Judged, adversarial: Judged, threshold: float) -> dict[str, Any]:
    """Shares in [0, 1]; None where nothing is counted (acc_cla when all are flagged). Above `threshold` is flagged.

    acc_adv: adversarial images flagged. acc_nadv: natural images accepted. acc_cla: of the adversarial images that
    are accepted, those classified correctly. acc_com: adversarial images flagged, or accepted and classified
    correctly; rejecting everything makes it 1, so it stands beside system_natural: natural images accepted AND
    classified correctly. auroc and tpr_at_5_fpr are of the odds, whatever the threshold.
    """
    if not len(natural.odds) or not len(adversarial.odds):
        raise UserError("detection is measured on natural and adversarial images, and one of them is missing")
    flagged, accepted = adversarial.odds > threshold, ~(natural.odds > threshold)
    through = ~flagged & adversarial.right
    left = int((~flagged).sum())
    return {
        "acc_adv": _share(flagged),
        "acc_nadv": _share(accepted),
        "acc_cla": int(through.sum()) / left if left else None,
        "acc_com": _share(flagged | through),
        "system_natural": _share(accepted & natural.right),
        "auroc": auroc(natural.odds, adversarial.odds),
        "tpr_at_5_fpr": tpr_at_fpr(natural.odds, adversarial.odds, 0.05),
        "n_adversarial": len(adversarial.odds),
        "n_natural": len(natural.odds),
    }


def auroc(natural: np.ndarray, adversarial: np.ndarray) -> float:
    """The chance that an adversarial image has higher odds than a natural one; ties count half."""
    values = np.concatenate([natural, adversarial])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n, m = len(adversarial), len(natural)
    return float((ranks[m:].sum() - n * (n + 1) / 2) / (n * m))


def tpr_at_fpr(natural: np.ndarray, adversarial: np.ndarray, share: float) -> float:
    """Adversarial images above the lowest threshold that at most `share` of the natural ones are above."""
    allowed = int(share * len(natural) + 1e-9)
    return _share(adversarial > np.sort(natural)[len(natural) - 1 - min(allowed, len(natural) - 1)])


def mean_and_deviation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each figure over repetitions, with "<figure>_sd" (n - 1) where there are several.

    What is None in a repetition is left out of its mean; numbers of images are those of the first repetition.
    """
    out: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        out[key] = float(np.mean(values)) if values else None
        if key.startswith("n_"):
            out[key] = rows[0][key]
        elif len(rows) > 1:
            out[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return out


def _share(hits: np.ndarray) -> float:
    return float(hits.mean())
