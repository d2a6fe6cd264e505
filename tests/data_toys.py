"""Small datasets in the files that the real ones come in."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np

from casemate.data.files import FileDataset
from casemate.data.mnist import IDX, MNIST, idx_header
from casemate.data.sources import Source

COUNTS = {"train": 50, "test": 20}
FILES = {array: f"{name}.gz" for array, name in IDX.items()}


def arrays_of(kind: type[FileDataset]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    channels, height, width = kind.input_shape
    made: dict[str, np.ndarray] = {}
    for split, n in COUNTS.items():
        made[f"{split}_images"] = draw.integers(0, 256, (n, height, width, channels), dtype=np.uint8)
        made[f"{split}_labels"] = draw.integers(0, 10, n, dtype=np.uint8)
    return made


def small(kind: type[FileDataset], *asked: Source) -> FileDataset:
    """A dataset like `kind` with few images and the checksums of `arrays_of(kind)`."""
    plain = kind()
    checksums = {name: plain.digest(name, array) for name, array in arrays_of(kind).items()}
    made: FileDataset = type(kind.__name__, (kind,), {"counts": COUNTS, "checksums": checksums, "sources": asked})()
    return made


def idx_files() -> dict[str, bytes]:
    """The four small idx files by name, unpacked."""
    return {IDX[name]: idx_header(a.shape[:3]) + a.tobytes() for name, a in arrays_of(MNIST).items()}


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    """An archive of files by name; mode `w:gz` packs it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tgz(members: dict[str, bytes]) -> bytes:
    return tar(members, "w:gz")
