"""Images as the page shows them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

RAISED, LOWERED = (224, 122, 20), (32, 113, 181)


def picture_uri(image: np.ndarray) -> str:
    """1 x C x H x W in [0, 1] as the address of a PNG."""
    levels = np.rint(image[0].transpose(1, 2, 0) * 255).astype(np.uint8)
    return _uri(Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels))


def difference_uri(image: np.ndarray, attacked: np.ndarray) -> str:
    """What was added, mean over the channels: raised pixels orange, lowered ones blue, the strongest opaque."""
    change = (attacked - image)[0].mean(0)
    most = float(np.abs(change).max()) or 1.0
    shown = np.zeros((*change.shape, 4), np.uint8)
    shown[..., :3] = np.where((change > 0)[..., None], RAISED, LOWERED)
    shown[..., 3] = np.rint(np.abs(change) / most * 255)
    return _uri(Image.fromarray(shown))


def _uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
