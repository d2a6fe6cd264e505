"""A user's own pictures: one folder a class, read at the shape a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from casemate.data import pictures
from casemate.data.base import Images
from casemate.errors import UserError, near

LIMIT = 4 << 30  # bytes of decoded pictures held in memory


class FolderImages(NamedTuple):
    """What was read, and what could not be."""

    images: Images
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    """Of each image, relative to the folder."""
    unreadable: tuple[str, ...]
    """`path: why`, one for each file left out."""
    conversion: str
    """What was done to the pictures, for the report."""


def read_folder(
    folder: Path,
    input_shape: tuple[int, int, int],
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
) -> FolderImages:
    """Read `folder/CLASS/*` as uint8 images of `input_shape` (C, H, W), C 1 or 3.

    Class i is `classes[i]`; without `classes`, the sub-folders sorted by name. A picture of another size is scaled
    until it just covers H x W and cut at the centre; see `pictures.convert` for colours. `per_class` keeps the first
    pictures of each class by name. Raises UserError when there is nothing to read, when a sub-folder is no known
    class, and when the pictures would not fit in 4 GiB.
    """
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise UserError(f"pictures can be read as 1 or 3 channels, and the model takes {channels}")
    known = tuple(classes) if classes is not None else class_folders(folder)
    chosen = _files(folder, known, per_class)
    if len(chosen) * channels * height * width > LIMIT:
        raise UserError(f"{folder}: {len(chosen):,} pictures of {input_shape} exceed 4 GiB; take fewer of each class")
    out = np.empty((len(chosen), height, width, channels), dtype=np.uint8)
    labels: list[int] = []
    paths, unreadable, resized = [], [], 0
    for label, path in chosen:
        try:
            picture = pictures.decode(path.read_bytes())
        except (pictures.Unreadable, OSError) as error:
            unreadable.append(f"{path.relative_to(folder)}: {error}")
            continue
        resized += picture.size != (width, height)
        shaped = pictures.fit(pictures.convert(picture, channels), height, width)
        out[len(labels)] = np.asarray(shaped).reshape(height, width, channels)
        labels.append(label)
        paths.append(str(path.relative_to(folder)))
    if not labels:
        raise UserError(f"{folder}: none of {len(chosen):,} files is a readable picture; the first: {unreadable[0]}")
    conversion = f"{'RGB' if channels == 3 else 'grey'}; {resized:,} of {len(labels):,} scaled and cut at the centre"
    images = Images(out[: len(labels)], np.asarray(labels, dtype=np.int64))
    return FolderImages(images, known, tuple(paths), tuple(unreadable), f"{conversion} to {width}x{height}")


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders, sorted; hidden ones do not count. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one with a sub-folder of pictures for each class")
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not found:
        raise UserError(f"{folder} has no sub-folders; put the pictures of each class in a sub-folder of its name")
    return tuple(found)


def _files(folder: Path, known: tuple[str, ...], per_class: int | None) -> list[tuple[int, Path]]:
    """(label, path) of every picture file, class by class."""
    chosen = []
    for name in class_folders(folder):
        if name not in known:
            raise UserError(f"{folder / name} is not a class of the model{near(name, known)}")
        files = pictures.picture_files(folder / name)
        chosen += [(known.index(name), path) for path in files[:per_class]]
    if not chosen:
        raise UserError(f"{folder} has sub-folders but no picture files ({', '.join(sorted(pictures.SUFFIXES))})")
    return sorted(chosen)
