"""How often a purification with a band, such as the limited form of IMT, treats clean images otherwise."""

from __future__ import annotations

from typing import Any

import torch

from casemate.evaluation.ledger import full_precision
from casemate.evaluation.plan import Runner
from casemate.system import System


def band_entry(system: System, runner: Runner, images: int) -> dict[str, Any] | None:
    """{"low", "high", "inside", "n", "lowest", "highest"}: the band, how many of the first `images` clean images have
    a score strictly inside it, and between which scores they all lie. None for a system without a band.

    Where none is inside, the system decides clean images as the full form does. One score for each image is all it
    costs, and no attack is needed: the scores of attacked images are another question.
    """
    purification = system.purification
    if purification is None or "band" not in system.offers:
        return None
    low, high = purification.spec["band"]
    order, parts = runner.order(images), []
    with system.frozen(), full_precision():
        for start in range(0, len(order), runner.ledger.chunk):
            parts.append(purification.score(runner.data.take(order[start : start + runner.ledger.chunk])[0]).cpu())
    scores = torch.cat(parts)
    inside = int(((scores > low) & (scores < high)).sum())
    ends = {"lowest": round(float(scores.min()), 6), "highest": round(float(scores.max()), 6)}
    return {"low": low, "high": high, "inside": inside, "n": len(scores), **ends}
