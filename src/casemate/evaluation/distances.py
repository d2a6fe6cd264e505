"""Distances of the adversarial images that an evaluation kept, on request: the ledger has linf and l2, not IWD."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from casemate.errors import UserError
from casemate.iwd import IWD, Windows, measure
from casemate.iwd.sliced import directions, sliced
from casemate.seeding import generator

NEEDED = ("indices", "labels", "x_clean", "x_adv", "prediction_clean", "prediction_adv", "attack")


@dataclass(frozen=True)
class Distances:
    """Of n images: `rows` holds what each is (index, attack, success), linf, l2 and mean |x_adv - x|, all (n,);
    `columns` says of each further column of `rows` how it was measured."""

    rows: dict[str, np.ndarray]
    columns: dict[str, dict[str, Any]]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Of each attack, on its successful images alone: n, and mean, median and quartiles of every distance."""
        found: dict[str, dict[str, Any]] = {}
        for attack in sorted(set(self.rows["attack"].tolist())):
            mine = (self.rows["attack"] == attack) & self.rows["success"]
            names = ["linf", "l2", "mean_abs", *self.columns] if mine.any() else []
            figures = {name: _figures(self.rows[name][mine]) for name in names}
            found[str(attack)] = {"n": int(mine.sum()), **figures}
        return found

    def save(self, path: Path) -> None:
        """Write it all as JSON, to a temporary name and renamed."""
        rows = {name: values.tolist() for name, values in self.rows.items()}
        content = {"schema": 1, "columns": self.columns, "summary": self.summary(), "rows": rows}
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)


def stored_distances(
    path: Path, protocol: Sequence[Windows], *, images: int | None = None, projections: int = 0
) -> Distances:
    """Measure the first `images` (all, if None) of an `adversarial.npz` of the evaluate stage.

    Each of the `protocol` gives a column `iwd <windows>` of exact distances per element, the floor taken off where
    the windows are drawn independently. `projections` (0, or 2 and more) adds a column of the sliced distance over
    all windows of the last one's size at full size, along the same directions for every image and attack. Success is
    an attack that worked: clean errors and rejected images do not count. Raises UserError if the file cannot be read.
    """
    kept = {name: values[:images] for name, values in _read(path).items()}
    x, x_adv = torch.from_numpy(kept["x_clean"]), torch.from_numpy(kept["x_adv"])
    delta = (x_adv.double() - x.double()).flatten(1)
    right = kept["prediction_clean"] == kept["labels"]
    fallen = (kept["prediction_adv"] != kept["labels"]) & (kept["prediction_adv"] >= 0)
    rows: dict[str, np.ndarray] = {
        "index": kept["indices"], "attack": kept["attack"], "success": right & fallen,
        "linf": delta.abs().amax(1).numpy(), "l2": delta.norm(dim=1).numpy(), "mean_abs": delta.abs().mean(1).numpy(),
    }  # fmt: skip
    columns: dict[str, dict[str, Any]] = {}
    for windows in protocol:
        measured: IWD = measure(x, x_adv, windows)
        rows[f"iwd {windows}"], columns[f"iwd {windows}"] = measured.excess, measured.about()
    if projections:
        name, column, about = _sliced(x, x_adv, Windows(size=protocol[-1].size), projections)
        rows[name], columns[name] = column, about
    return Distances(rows, columns)


def _sliced(
    x: torch.Tensor, x_adv: torch.Tensor, windows: Windows, projections: int
) -> tuple[str, np.ndarray, dict[str, Any]]:
    theta = directions(projections, x.shape[1], windows, generator("sliced", 0))
    with torch.no_grad():
        parts = [sliced(x[i : i + 1], x_adv[i : i + 1], windows, theta) for i in range(len(x))]
    value, error = (torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("value", "error"))
    relative = float(np.median(error / np.maximum(value, 1e-12)))
    about = {
        "method": "sliced", "size": windows.size, "stride": 1, "scale": None, "projections": projections,
        "seed": 0, "relative_error": relative,
    }  # fmt: skip
    return f"sliced {windows}", value, about


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("a bare array")
        with found as file:
            if not file.files:
                raise UserError(f"{path} holds no images: the evaluation kept none")
            return {name: file[name] for name in NEEDED}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an adversarial.npz of the evaluate stage ({error})") from None


def _figures(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values.astype(np.float64), [25, 50, 75])
    return {"mean": float(values.mean()), "median": float(median), "q25": float(low), "q75": float(high)}
