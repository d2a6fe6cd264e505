"""Attacked pictures to be looked at: beside the clean one scale by scale, and many of them on a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from casemate.networks.patch_pyramid import Size, resized, size_of

GAP = 4
"""White pixels between the panels."""
CAPTION = 14
"""Height of a line of text."""


def picture_strip(
    x: Tensor, x_adv: Tensor, scales: Sequence[Size], gain: float = 4.0, panel: Size | None = None
) -> np.ndarray:
    """Bytes (height x width x 3) of a picture (both C x H x W in [0, 1], C 1 or 3): a row for each scale, coarsest
    first, of the original, the adversarial picture and mid-grey plus `gain` times their difference.

    Every panel has the size `panel`, that of the picture by default; pixels of a coarse scale are shown as squares.
    """
    size, rows = panel or size_of(x), []
    for scale in scales:
        clean, adversarial = (resized(part[None], scale) for part in (x, x_adv))
        difference = (0.5 + gain * (adversarial - clean)).clamp(0, 1)
        panels = [torch.nn.functional.interpolate(part, size)[0] for part in (clean, adversarial, difference)]
        rows.append(_joined(panels, dim=2))
    return _bytes(_joined(rows, dim=1))


def write_strip(
    path: Path, x: Tensor, x_adv: Tensor, scales: Sequence[Size], gain: float = 4.0, panel: Size | None = None
) -> Path:
    """`picture_strip` as a file of the kind that its suffix says, written aside and renamed."""
    return _save(picture_strip(x, x_adv, scales, gain, panel), path)


def write_sheet(path: Path, rows: Sequence[Sequence[tuple[np.ndarray, str]]], panel: int = 96) -> Path:
    """Rows of pictures (C x H x W in [0, 1], C 1 or 3), `panel` pixels wide, each with a line of text above it; rows
    may be of different lengths. A file of the kind that the suffix says, written aside and renamed."""
    tall = CAPTION + panel + GAP
    sheet = Image.new("RGB", (max(len(row) for row in rows) * (panel + GAP), len(rows) * tall), "white")
    drawn = ImageDraw.Draw(sheet)
    for down, row in enumerate(rows):
        for across, (picture, text) in enumerate(row):
            at = (across * (panel + GAP), down * tall)
            drawn.text((at[0] + 1, at[1] + 1), text, fill="black")
            shown = Image.fromarray(_bytes(torch.from_numpy(np.array(picture))))
            way = Image.Resampling.NEAREST if shown.width < panel else Image.Resampling.LANCZOS
            sheet.paste(shown.resize((panel, panel), way), (at[0], at[1] + CAPTION))
    return _save(np.asarray(sheet), path)


def _save(pixels: np.ndarray, path: Path) -> Path:
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    options = {} if kind == "PNG" else {"quality": 85, "subsampling": 0}
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(temporary, format=kind, **options)
    return temporary.replace(path)


def _bytes(picture: Tensor) -> np.ndarray:
    pixels = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    gap = list(parts[0].shape)
    gap[dim] = GAP
    white = parts[0].new_ones(gap)
    return torch.cat([piece for part in parts for piece in (white, part)][1:], dim=dim)
