"""The development set of the NIPS 2017 competition on adversarial examples: 1,000 pictures of ImageNet's classes."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from casemate.data import pictures
from casemate.data.archives import find
from casemate.data.files import Arrays, FileDataset
from casemate.data.sources import Local, SourceFailed
from casemate.data.splits import shuffled
from casemate.fields import spec

TABLE = "images.csv"
PICTURE, LABEL = "ImageId", "TrueLabel"
"""The columns of the table that are read."""


@spec
class NIPS17(FileDataset):
    """1,000 colour pictures (CC BY 2.0) with a label of ImageNet's 1,000 classes, for classifiers that know them.

    From CASEMATE_DATA, a folder with images.csv and the pictures it names, in whatever format. They are scaled until
    they just cover 224x224 and cut at the centre. The set has no training part: a fixed random half serves attacks
    that learn, and the other half, the test split, is what is attacked. Nothing published says what the arrays must
    hash to: the manifest records it.
    """

    name = "nips17"
    input_shape = (3, 224, 224)
    classes = tuple(f"class {number}" for number in range(1000))
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    flip = True
    counts: ClassVar = {"train": 500, "test": 500}
    sources = (Local(),)
    bring = f"{TABLE} of the NIPS 2017 development set and its pictures"
    space = 200_000_000

    def decode(self, folder: Path) -> Arrays:
        tables = find(folder, [TABLE])[TABLE]
        if not tables:
            raise SourceFailed(f"no {TABLE} in {folder}")
        labels = _labels(tables[0])
        files = {path.stem: path for path in sorted(tables[0].parent.rglob("*")) if path.suffix in pictures.SUFFIXES}
        missing = sorted(labels.keys() - files.keys())
        if missing or len(labels) != sum(self.counts.values()):
            raise SourceFailed(f"{tables[0]} names {len(labels)} pictures, and {len(missing)} of them are not there")
        names = sorted(labels)
        order = [names[at] for at in shuffled(len(names), "nips17")]
        halves = {"train": sorted(order[: self.counts["train"]]), "test": sorted(order[self.counts["train"] :])}
        return {
            f"{split}_{kind}": np.stack([self._picture(files[n]) for n in half])
            if kind == "images"
            else np.array([labels[n] for n in half])
            for split, half in halves.items()
            for kind in ("images", "labels")
        }

    def digest(self, name: str, array: np.ndarray) -> str:
        """sha256 of its bytes, labels as little-endian 16-bit numbers."""
        plain = array.astype("<u2") if name.endswith("labels") else array
        return hashlib.sha256(np.ascontiguousarray(plain).data.cast("B")).hexdigest()

    def _picture(self, path: Path) -> np.ndarray:
        channels, height, width = self.input_shape
        try:
            read = pictures.decode(path.read_bytes())
        except pictures.Unreadable as error:
            raise SourceFailed(f"{path} {error}") from None
        return np.asarray(pictures.fit(pictures.convert(read, channels), height, width))


def _labels(table: Path) -> dict[str, int]:
    """Label by picture; the table counts classes from 1. Raises SourceFailed, naming what the table lacks."""
    with table.open(newline="") as lines:
        read = csv.DictReader(lines)
        header = read.fieldnames or []
        if not {PICTURE, LABEL} <= set(header):
            told = ", ".join(header) or "none"
            raise SourceFailed(f"{table} needs the columns {PICTURE} and {LABEL}, and has {told}")
        try:
            return {line[PICTURE]: int(line[LABEL]) - 1 for line in read}
        except (TypeError, ValueError):  # a short line has None there
            raise SourceFailed(f"{table}, line {read.line_num}: its {LABEL} is not a number") from None
