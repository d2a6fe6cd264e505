"""The adversarial images that an evaluation keeps: for the report's pictures and the export's parity check."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from casemate.evaluation import robustness
from casemate.evaluation.ledger import full_precision
from casemate.evaluation.masking import Finished
from casemate.evaluation.plan import Runner
from casemate.system import System


def gallery(system: System, suites: Sequence[Finished], runner: Runner) -> dict[str, np.ndarray]:
    """Each kept image with the worst that was found for a system, inside the threat model.

    indices, labels (n,); x_clean, x_adv n x C x H x W float32; prediction_clean, prediction_adv (n,); attack (n,):
    the first that made the system wrong, else the last one; x_purified where the system purifies. Empty if nothing
    was to be kept.
    """
    indices = runner.order(runner.keep)
    if not indices:
        return {}
    x, y = runner.data.take(indices)
    found = x.cpu().numpy().copy()
    labels = y.cpu().numpy()
    names = np.full(len(indices), "clean", dtype="<U64")
    wrong = np.zeros(len(indices), dtype=bool)
    place = {index: i for i, index in enumerate(indices)}
    for f in suites:
        kept = f.cell.x_adv()
        inside = robustness.contained(f.cell, runner.threat)
        rows = zip(f.cell.rows["index"].tolist(), f.cell.rows["prediction"].tolist(), inside, strict=True)
        for index, prediction, contained in rows:
            i = place.get(index)
            if i is None or wrong[i] or not contained or index not in kept:
                continue
            found[i], names[i] = kept[index], f.planned.name
            wrong[i] = prediction not in (labels[i], -1)
    arrays = {"indices": np.asarray(indices), "labels": labels, "x_clean": x.cpu().numpy(), "x_adv": found}
    return {**arrays, "attack": names, **_decided(system, runner, found, x)}


def _decided(system: System, runner: Runner, found: np.ndarray, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What the system decides on the kept images, and what it makes of them."""
    size = runner.ledger.chunk
    adversarial = torch.from_numpy(found).to(x.device)
    purify = getattr(system, "purification", None)
    out: dict[str, list[np.ndarray]] = {"prediction_clean": [], "prediction_adv": []}
    with system.frozen(), full_precision(), torch.no_grad():
        for start in range(0, len(x), size):
            batch = adversarial[start : start + size]
            out["prediction_clean"].append(system.decide(x[start : start + size]).cpu().numpy())
            out["prediction_adv"].append(system.decide(batch).cpu().numpy())
            if purify is not None:
                out.setdefault("x_purified", []).append(purify(batch).cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in out.items()}
