"""A JPEG or PNG as images of a model's shape. Whatever was done to the picture is said."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from casemate.errors import shorten
from casemate.serving.limits import Limits, Refusal

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG"}
SEVERAL = "MPO"  # JPEGs one after the other in a file, as cameras with two lenses write them
PLAIN = {"1": "L", "L": "L", "RGB": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}
SEE_THROUGH = ("LA", "PA", "RGBA", "La", "RGBa")


@dataclass(frozen=True)
class Picture:
    """image: 1 x C x H x W float32 in [0, 1]. size: (width, height) as it came. changes: what was done, in words."""

    image: np.ndarray
    size: tuple[int, int]
    changes: tuple[str, ...]


def media_type(header: str | None) -> str:
    """Of a Content-Type header; empty if there is none."""
    return (header or "").partition(";")[0].strip().lower()


def picture_type(header: str | None) -> str:
    """The media type, if it is one of `FORMATS`. Raises Refusal if it is not."""
    found = media_type(header)
    if found not in FORMATS:
        raise Refusal(415, "media_type", f"Content-Type {shorten(header or '')!r}; send image/jpeg or image/png")
    return found


def read_picture(body: bytes, kind: str, shape: tuple[int, int, int], limits: Limits) -> Picture:
    """A picture of the media type `kind` for a model that takes images of `shape` (C, H, W). Raises Refusal."""
    if not body:
        raise Refusal(400, "empty", "the body is empty; send a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, for which there is a limit of ours, and of damaged EXIF data
            return _read(body, kind, shape, limits)
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise Refusal(413, "pixels", f"too many pixels; at most {limits.pixels:,} are taken") from None
    except UnidentifiedImageError:  # its own words name an address in memory
        raise Refusal(400, "picture", "not a picture that can be read: it begins as neither JPEG nor PNG") from None
    except Exception as error:  # a decoder of damaged files raises whatever it stumbles on
        raise Refusal(400, "picture", f"not a picture that can be read: {shorten(str(error), 150)}") from None


def _read(body: bytes, kind: str, shape: tuple[int, int, int], limits: Limits) -> Picture:
    channels, height, width = shape
    found = Image.open(io.BytesIO(body), formats=tuple(FORMATS.values()))  # reads no more than the header
    size = found.size
    if found.format != FORMATS[kind] and (found.format, kind) != (SEVERAL, "image/jpeg"):
        raise Refusal(415, "media_type", f"Content-Type {kind}, and the picture is {found.format}")
    if size[0] * size[1] > limits.pixels:
        raise Refusal(413, "pixels", f"{size[0]} x {size[1]} pixels; at most {limits.pixels:,} are taken")
    changes = []
    frames = getattr(found, "n_frames", 1)
    if frames > 1 and found.format == SEVERAL:
        changes.append(f"the first of {frames} pictures in the file")
    elif frames > 1:
        raise Refusal(415, "picture", "an animated picture; send one frame")
    found.load()
    upright = ImageOps.exif_transpose(found)
    if upright.size != size or found.getexif().get(0x0112, 1) != 1:
        changes.append("turned as its EXIF orientation says")
    flat = _opaque(upright, changes)
    wanted = "L" if channels == 1 else "RGB"
    if flat.mode != wanted:
        changes.append("colours turned to grey" if wanted == "L" else "grey repeated in three channels")
        flat = flat.convert(wanted)
    if flat.size != (width, height):
        changes.append(f"resized from {flat.size[0]} x {flat.size[1]} to {width} x {height}, bilinear")
        flat = flat.resize((width, height), Image.Resampling.BILINEAR)
    levels = np.asarray(flat, np.uint8).reshape(height, width, channels)
    image = levels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    return Picture(np.ascontiguousarray(image), size, tuple(changes))


def _opaque(picture: Image.Image, changes: list[str]) -> Image.Image:
    """In mode L or RGB; what shines through is laid on white."""
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if picture.mode in SEE_THROUGH:
        picture = picture.convert("RGBA")
        if picture.getchannel(3).getextrema() != (255, 255):
            changes.append("transparency laid on white")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        grey = all(picture.getchannel(0).tobytes() == picture.getchannel(c).tobytes() for c in (1, 2))
        return picture.convert("L" if grey else "RGB")
    if picture.mode not in PLAIN:
        raise Refusal(415, "picture", f"pixels of mode {picture.mode}; save the picture with 8 bits for each channel")
    return picture.convert(PLAIN[picture.mode])
