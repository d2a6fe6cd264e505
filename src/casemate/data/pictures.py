"""Reading picture files of any kind as RGB or grey: what is converted how is said here, once."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})


class Unreadable(Exception):
    """Why a file gives no picture: one line."""


def picture_files(folder: Path) -> list[Path]:
    """The picture files right inside a folder, by suffix, sorted by name; hidden files do not count."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())


def decode(content: bytes) -> Image:
    """The whole picture, decoded, the camera's rotation applied. Raises Unreadable, also if it is absurdly large."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                opened.load()
                return ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable("has too many pixels") from None
    except UnidentifiedImageError:
        raise Unreadable("is not a picture") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise Unreadable(f"is damaged ({error})") from None


def convert(picture: Image, channels: int) -> Image:
    """As RGB (3 channels) or grey (1 channel), 8 bits each.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B; a grey picture becomes RGB with three equal channels; of a picture
    with transparency the colours are taken and the alpha channel is dropped; of 16-bit grey the upper byte counts.
    """
    from PIL import Image

    if picture.mode.startswith("I"):
        import numpy as np

        picture = Image.fromarray((np.clip(np.asarray(picture), 0, 65535) // 256).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")
    return picture.convert("RGB" if channels == 3 else "L")


def fit(picture: Image, height: int, width: int) -> Image:
    """Scaled (bilinear, antialiased) until it just covers height x width, then cut at the centre."""
    from PIL import Image, ImageOps

    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), method=Image.Resampling.BILINEAR)
