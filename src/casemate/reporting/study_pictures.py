"""The study's pictures of single images: strips over scales, contact sheets of attacks, targets of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from casemate.reporting.strip import write_sheet, write_strip
from casemate.reporting.study import plain

SCALES = (4, 2, 1)
"""Of a strip: the picture reduced so many times."""
STRIP_PANEL = 128

Found = tuple[Any, np.ndarray]
"""An `evaluation.attacked.Attacked`, and the index of each of its images."""


def strips(found: Sequence[Found], wanted: Sequence[str], folder: Path) -> list[Path]:
    """`strip-MODEL-ATTACK.jpg`: the first success of each wanted attack on each model."""
    written = []
    for case, _ in found:
        hits = np.flatnonzero(case.hits[:, 0])
        if case.attack not in wanted or not len(hits) or case.x_clean is None or case.x_adv is None:
            continue
        x, x_adv = (torch.from_numpy(part[hits[0]]) for part in (case.x_clean, case.x_adv))
        height, width = x.shape[1:]
        panel = (min(height, STRIP_PANEL), min(width, STRIP_PANEL))
        scales = [(max(1, height // by), max(1, width // by)) for by in SCALES]
        path = folder / f"strip-{plain(case.model)}-{plain(case.attack)}.jpg"
        written.append(write_strip(path, x, x_adv, scales, panel=panel))
    return written


def sheets(found: Sequence[Found], count: int, folder: Path) -> list[Path]:
    """`sheet-MODEL.jpg`: of the first `count` images that all its untargeted attacks have, the original and what
    every attack made of it. `targets-MODEL.jpg`: the same of its targeted attacks."""
    written = []
    for model in dict.fromkeys(case.model for case, _ in found):
        for name, aimed in (("sheet", False), ("targets", True)):
            mine = [(c, i) for c, i in found if c.model == model and (c.targets is not None) == aimed]
            rows = sheet_rows(mine, count)
            if rows:
                written.append(write_sheet(folder / f"{name}-{plain(model)}.jpg", rows))
    return written


def sheet_rows(found: Sequence[Found], count: int) -> list[list[tuple[np.ndarray, str]]]:
    """A row for each image that was right before and that all of the cases hold: itself, then every attack's.

    Captions are the label, then the attack and the prediction that it leaves, with a star where it succeeded.
    """
    places: list[Mapping[int, int]] = [{int(index): at for at, index in enumerate(indices)} for _, indices in found]
    if not places:
        return []
    common = [index for index in sorted(places[0]) if all(index in place for place in places)]
    first, at = found[0][0], places[0]
    rows = []
    for index in [i for i in common if first.right[at[i]]][:count]:
        assert first.x_clean is not None
        row = [(first.x_clean[at[index]], f"label {first.labels[at[index]]}")]
        for (case, _), place in zip(found, places, strict=True):
            i = place[index]
            star = "*" if case.hits[i, 0] else ""
            assert case.x_adv is not None
            row.append((case.x_adv[i], f"{short(case.attack)} {case.draws[i, 0]}{star}"))
        rows.append(row)
    return rows


def short(name: str, most: int = 12) -> str:
    return name if len(name) <= most else name[: most - 1] + "."
