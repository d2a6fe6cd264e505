"""STL-10 (Coates, Ng, Lee 2011): 96x96 colour images of ten classes, from its binary files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from casemate.data.archives import BadArchive, find, read_limited, read_tar
from casemate.data.files import Arrays, FileDataset, as_bytes
from casemate.data.sources import Local, Official, SourceFailed
from casemate.fields import spec

ARCHIVE = "stl10_binary.tar.gz"
FILES = {
    "train_images": "train_X.bin",
    "train_labels": "train_y.bin",
    "test_images": "test_X.bin",
    "test_labels": "test_y.bin",
}


@spec
class STL10(FileDataset):
    """5,000 + 8,000 labelled colour images; the 100,000 without labels are left out, as in the papers.

    The files hold each channel column by column and count labels from 1, and nothing else: the published md5 of a
    file is therefore a checksum of the decoded content.
    """

    name = "stl10"
    input_shape = (3, 96, 96)
    classes = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    mean = (0.4467, 0.4398, 0.4066)
    std = (0.2603, 0.2566, 0.2713)
    pad = 4
    flip = True
    counts: ClassVar = {"train": 5_000, "test": 8_000}
    checksums: ClassVar = {
        "train_images": "918c2871b30a85fa023e0c44e0bee87f",
        "train_labels": "5a34089d4802c674881badbb80307741",
        "test_images": "7f263ba9f9e0b06b93213547f721ac82",
        "test_labels": "36f9794fa4beb8a2c72628de14fa638e",
    }
    algorithm = "md5"
    sources = (Local(), Official("STL10", 2_640_397_119))
    bring = "stl10_binary.tar.gz or its train_X.bin, train_y.bin, test_X.bin and test_y.bin"
    space = 7_000_000_000  # the official archive is unpacked with the images that have no labels

    def digest(self, name: str, array: np.ndarray) -> str:
        stored = array.transpose(0, 3, 2, 1) if name.endswith("images") else as_labels(array)
        return hashlib.md5(as_bytes(stored), usedforsecurity=False).hexdigest()

    def decode(self, folder: Path) -> Arrays:
        found = find(folder, [ARCHIVE, *FILES.values()])
        if all(found[name] for name in FILES.values()):
            files = {file: read_limited(found[file][0], self._size(name)) for name, file in FILES.items()}
        elif found[ARCHIVE]:
            limit = sum(map(self._size, FILES))
            files = read_tar(found[ARCHIVE][0], r"stl10_binary/(train|test)_[Xy]\.bin", limit=limit)
        else:
            raise SourceFailed(f"neither {ARCHIVE} nor its four labelled .bin files there")
        return {name: self._array(name, files) for name in FILES}

    def _size(self, name: str) -> int:
        return int(np.prod(self.shape(name)))

    def _array(self, name: str, files: dict[str, bytes]) -> np.ndarray:
        content = files.get(FILES[name], b"")
        if len(content) != self._size(name):
            raise BadArchive(f"{FILES[name]} holds {len(content):,} of {self._size(name):,} bytes: truncated")
        values = np.frombuffer(content, dtype=np.uint8)
        if name.endswith("labels"):
            return values.astype(np.int64) - 1
        count, height, width, channels = self.shape(name)
        return values.reshape(count, channels, width, height).transpose(0, 3, 2, 1)


def as_labels(labels: np.ndarray) -> np.ndarray:
    """As the files count them."""
    return labels.astype(np.int64) + 1
