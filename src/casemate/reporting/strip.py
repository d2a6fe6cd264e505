"""An attacked picture beside the clean one, scale by scale: where in the pyramid an attack has changed it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from casemate.networks.patch_pyramid import Size, resized, size_of

GAP = 4
"""White pixels between the panels."""


def picture_strip(x: Tensor, x_adv: Tensor, scales: Sequence[Size], gain: float = 4.0) -> np.ndarray:
    """Bytes (height x width x 3) of a picture (both C x H x W in [0, 1], C 1 or 3): a row for each scale, coarsest
    first, of the original, the adversarial picture and mid-grey plus `gain` times their difference.

    Every panel is as large as the picture; the pixels of a coarse scale are shown as squares.
    """
    size, rows = size_of(x), []
    for scale in scales:
        clean, adversarial = (resized(part[None], scale) for part in (x, x_adv))
        difference = (0.5 + gain * (adversarial - clean)).clamp(0, 1)
        panels = [torch.nn.functional.interpolate(part, size)[0] for part in (clean, adversarial, difference)]
        rows.append(_joined(panels, dim=2))
    drawn = _joined(rows, dim=1)
    pixels = (drawn.detach().cpu().clamp(0, 1) * 255).round().byte().expand(3, -1, -1)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def write_strip(path: Path, x: Tensor, x_adv: Tensor, scales: Sequence[Size], gain: float = 4.0) -> Path:
    """`picture_strip` as a PNG, written aside and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(picture_strip(x, x_adv, scales, gain)).save(temporary, format="PNG")
    return temporary.replace(path)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    gap = list(parts[0].shape)
    gap[dim] = GAP
    white = parts[0].new_ones(gap)
    return torch.cat([piece for part in parts for piece in (white, part)][1:], dim=dim)
