"""Figures from the ledger's rows: accuracy with its interval, attack success rate, the worst case, paired tests.

Clean errors count as failures everywhere. Accuracies are fractions in [0, 1]. No torch is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from casemate.evaluation.ledger import Cell
    from casemate.threat import ThreatModel

Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution
SIGNIFICANT = 0.01


def wilson(hits: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), 95 % by default; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if hits == 0 else (centre - half) / scale
    return low, 1.0 if hits == n else (centre + half) / scale


def binomial_tail(hits: int, n: int, rate: float) -> float:
    """P(X >= hits) for n draws of chance `rate` in (0, 1)."""
    logs = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        + i * math.log(rate) + (n - i) * math.log1p(-rate)
        for i in range(hits, n + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(math.exp(v) for v in logs))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact McNemar test (1947), one-sided: the p value for "the first has more" from the pairs that differ.

    Under the null hypothesis each of them falls to either side with chance 1/2.
    """
    return binomial_tail(only_first, only_first + only_second, 0.5)


def rate(fallen: np.ndarray) -> dict[str, Any]:
    """{"accuracy", "low", "high", "n"} of what is left when `fallen` (N,) bool has fallen; accuracy 0 for n = 0."""
    n = len(fallen)
    left = n - int(fallen.sum())
    low, high = wilson(left, n)
    return {"accuracy": left / n if n else 0.0, "low": low, "high": high, "n": n}


def clean_rate(cell: Cell) -> dict[str, Any]:
    """`rate` of the clean images, with the number of correct ones."""
    return {"correct": int((~cell.clean_error).sum()), **rate(cell.clean_error)}


def attack_success_rate(cell: Cell) -> float | None:
    """Successes among the images that were right before; None if there were none. accuracy = clean * (1 - ASR)."""
    right = ~cell.clean_error
    return float(cell.rows["success"][right].mean()) if right.any() else None


def figures(cell: Cell) -> dict[str, Any]:
    """A cell's figures: its rate, attack success rate, mean passes per image, and how far the attack went.

    `linf_max` is over all images, `l2_mean` over those that were right before; both in pixel units.
    """
    rows, right = cell.rows, ~cell.clean_error
    spent = {name: float(rows[name].mean()) if len(cell) else 0.0 for name in ("forwards", "backwards", "queries")}
    return {
        **rate(rows["success"]),
        "asr": attack_success_rate(cell),
        **spent,
        "linf_max": round(float(rows["linf"].max()), 6) if len(cell) else None,
        "l2_mean": round(float(rows["l2"][right].mean(dtype=np.float64)), 6) if right.any() else None,
    }


def contained(cell: Cell, threat: ThreatModel) -> np.ndarray:
    """(N,) bool: the attacked image lies in the ball. The box was checked when the row was made."""
    from casemate.threat import TOLERANCE

    slack = TOLERANCE if threat.norm == "linf" else TOLERANCE * max(1.0, cell.dimensions**0.5)
    inside: np.ndarray = cell.rows[threat.norm].astype(np.float64) <= threat.radius + slack
    return inside


def fallen(cell: Cell, threat: ThreatModel) -> np.ndarray:
    """(N,) bool: wrong when clean, or wrong when attacked, at a distance inside the threat model.

    `threat` need not be the attack's own: one cell of a minimum-norm attack gives the accuracy at every radius.
    """
    wrong = (cell.rows["prediction"] != cell.rows["label"]) & (cell.rows["prediction"] >= 0)  # -1 is a rejection
    down: np.ndarray = cell.clean_error | (wrong & contained(cell, threat))
    return down


def common_images(cells: Sequence[Cell]) -> np.ndarray:
    """Indices (sorted) of the images that every cell has finished."""
    return reduce(np.intersect1d, (cell.rows["index"] for cell in cells))


def worst_case(cells: Mapping[str, Cell], threat: ThreatModel) -> dict[str, Any] | None:
    """The accuracy that is left when each image meets every attack: {"accuracy", "low", "high", "n", ...}.

    n are the images that every attack which has begun has finished; those that lack images, all or some, are
    named under "incomplete". None if nothing has been finished by all.
    """
    begun = {name: cell for name, cell in cells.items() if len(cell)}
    if not begun:
        return None
    images = common_images(list(begun.values()))
    if not len(images):
        return None
    union = np.any([fallen(cell.at(images), threat) for cell in begun.values()], axis=0)
    incomplete = [name for name, cell in cells.items() if not cell.complete]
    return {**rate(union), "attacks": sorted(begun), "incomplete": sorted(incomplete)}


def beats(first: np.ndarray, second: np.ndarray) -> tuple[bool, float]:
    """(whether more images fell in `first` than in `second` beyond chance, p): paired, McNemar at p < .01."""
    p = mcnemar(int((first & ~second).sum()), int((second & ~first).sum()))
    return p < SIGNIFICANT, p
