"""Tiny-ImageNet-200: 64x64 colour images of 200 ImageNet classes, from the official zip or its unpacked files."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np

from casemate.data import pictures
from casemate.data.archives import BadArchive, check_md5, find, inside, torn
from casemate.data.files import Arrays, FileDataset
from casemate.data.sources import Git, Local, Official, SourceFailed
from casemate.data.tinyimagenet_classes import CLASSES
from casemate.fields import spec

ARCHIVE = "tiny-imagenet-200.zip"
ROOT = "tiny-imagenet-200"
ANNOTATIONS = "val_annotations.txt"
T = TypeVar("T")
LARGEST = 1_000_000  # bytes of one file
JPEG = re.compile(r"(?:(n\d{8})|val|test)_(\d+)\.JPEG")

MIRROR = Git(
    repository="Sachitbansal/DLA",
    commit="44579204a3d8506f5aa76fb6695aa3b81eefe66a",
    folder=ROOT,
    members=rf"{ROOT}/(train/n\d{{8}}/images/n\d{{8}}|(val|test)/images/(val|test))_\d+\.JPEG|{ROOT}/val/{ANNOTATIONS}",
    size=400_000_000,
    unpacked=400_000_000,
)


class Files(NamedTuple):
    """The files of one copy: how to read each, by its name alone."""

    read: Callable[[str], bytes]
    names: list[str]


@spec
class TinyImageNet(FileDataset):
    """100,000 + 10,000 colour images; the official validation set is the test split, as its test set has no labels.

    Labels count the classes in the order of their WordNet ids. Content is known by the md5 of the official zip or by
    the list of the git hashes of all 120,000 pictures. Decoded pixels depend on the JPEG decoder in principle, so
    the manifest records what came out.
    """

    name = "tinyimagenet"
    input_shape = (3, 64, 64)
    classes = tuple(CLASSES.values())
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2302, 0.2265, 0.2262)
    pad = 4
    flip = True
    counts: ClassVar = {"train": 100_000, "test": 10_000}
    unlabelled: ClassVar = 10_000
    zip_md5: ClassVar = "90528d7ca1a48142e341f4ef8d21d0de"
    listing: ClassVar = "ea764a46452e8ed9a03a54bbbc998622c264bf8885092f59abd5c3fc2e9bb7c6"
    """sha256 over the sorted lines `git blob hash, two spaces, path` of all pictures."""
    sources = (Local(), Official(ARCHIVE, 248_100_043, url="http://cs231n.stanford.edu/", md5=zip_md5), MIRROR)
    bring = "tiny-imagenet-200.zip or the unpacked tiny-imagenet-200"
    space = 2_800_000_000

    def decode(self, folder: Path) -> Arrays:
        found = find(folder, [ARCHIVE, ANNOTATIONS])
        if found[ARCHIVE]:
            path = found[ARCHIVE][0]
            try:
                with zipfile.ZipFile(path) as archive:
                    return self._arrays(_of_zip(archive), known=_has_md5(path, self.zip_md5))
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted
                raise torn(error) from None
        if found[ANNOTATIONS]:
            return self._arrays(_of_folder(found[ANNOTATIONS][0].parent), known=False)
        raise SourceFailed(f"neither {ARCHIVE} nor an unpacked {ROOT} there")

    def _arrays(self, files: Files, *, known: bool) -> Arrays:
        """One picture at a time is in memory, beside the arrays."""
        labels = self._labels(files)
        arrays: dict[str, np.ndarray] = {
            "train_images": np.empty((self.counts["train"], 64, 64, 3), dtype=np.uint8),
            "train_labels": np.empty(self.counts["train"], dtype=np.int64),
            "test_images": np.empty((self.counts["test"], 64, 64, 3), dtype=np.uint8),
            "test_labels": np.empty(self.counts["test"], dtype=np.int64),
        }
        at = {"train": 0, "test": 0}
        hashes = []
        for name in sorted(labels, key=_order):
            content = files.read(name)
            if not known:
                hashes.append((_git_hash(content), _path(name)))
            label = labels[name]
            if label is None:
                continue
            split = "test" if name.startswith("val") else "train"
            arrays[f"{split}_images"][at[split]] = _pixels(name, content)
            arrays[f"{split}_labels"][at[split]] = label
            at[split] += 1
        if not known and self.listing not in (_listing(hashes, ""), _listing(hashes, f"{ROOT}/")):
            raise BadArchive("the pictures have the wrong checksum: altered")
        return arrays

    def _labels(self, files: Files) -> dict[str, int | None]:
        """Label of each picture, None for those of the test set. Raises BadArchive unless all are there."""
        number = {wnid: label for label, wnid in enumerate(CLASSES)}
        labels: dict[str, int | None] = {}
        annotated: dict[str, str] = {}
        for line in files.read(ANNOTATIONS).decode("ascii", "replace").splitlines():
            picture, wnid, *_ = [*line.split("\t"), "", ""]
            annotated[picture] = wnid
        for name in files.names:
            match = JPEG.fullmatch(name)
            if match is None:
                continue
            wnid = match[1] or annotated.get(name, "")
            if not name.startswith("test") and wnid not in number:
                raise BadArchive(f"{name} is of no known class ({wnid or 'no annotation'})")
            labels[name] = number.get(wnid)
        kinds = {"train": "n", "validation": "val", "test": "test"}
        counts = [self.counts["train"], self.counts["test"], self.unlabelled]
        for (kind, start), wanted in zip(kinds.items(), counts, strict=True):
            there = sum(name.startswith(start) for name in labels)
            if there != wanted:
                raise BadArchive(f"holds {there:,} of {wanted:,} {kind} pictures: incomplete")
        return labels


def _of_zip(archive: zipfile.ZipFile) -> Files:
    """The members by file name. Nothing is unpacked; a lying path, a second file of one name, and a bomb are bad."""
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = inside(info.filename).name
        if not (JPEG.fullmatch(name) or name == ANNOTATIONS):
            continue
        if name in infos:
            raise BadArchive(f"holds two files named {name!r}")
        if info.file_size > LARGEST:
            raise BadArchive(f"{name} unpacks to {info.file_size:,} bytes, more than {LARGEST:,}")
        infos[name] = info
    return Files(lambda name: archive.read(_known(infos, name)), list(infos))


def _of_folder(val: Path) -> Files:
    """The files below the folder that holds `val`, or beside the annotations where a mirror left all in one place."""
    root = val.parent if val.name == "val" else val
    paths = {path.name: path for path in root.rglob("*.JPEG")} | {ANNOTATIONS: val / ANNOTATIONS}

    def read(name: str) -> bytes:
        path = _known(paths, name)
        if path.stat().st_size > LARGEST:
            raise BadArchive(f"{name} has more than {LARGEST:,} bytes")
        return path.read_bytes()

    return Files(read, list(paths))


def _known(found: dict[str, T], name: str) -> T:
    if name not in found:
        raise BadArchive(f"holds no {name}")
    return found[name]


def _order(name: str) -> tuple[str, int]:
    """Pictures of a class one after the other, by number."""
    start, _, number = name.removesuffix(".JPEG").partition("_")
    return start, int(number)


def _path(name: str) -> str:
    start = name.partition("_")[0]
    return f"train/{start}/images/{name}" if start.startswith("n") else f"{start}/images/{name}"


def _pixels(name: str, content: bytes) -> np.ndarray:
    try:
        picture = pictures.convert(pictures.decode(content), 3)  # some are grey
    except pictures.Unreadable as error:
        raise BadArchive(f"{name} {error}") from None
    if picture.size != (64, 64):
        raise BadArchive(f"{name} has {picture.size[0]}x{picture.size[1]} pixels, not 64x64")
    return np.asarray(picture)


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _listing(hashes: list[tuple[str, str]], above: str) -> str:
    """The paths begin inside `tiny-imagenet-200` or above it: the published list does not say which."""
    lines = sorted(f"{digest}  {above}{path}\n" for digest, path in hashes)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _has_md5(path: Path, md5: str) -> bool:
    try:
        check_md5(path, md5)
    except BadArchive:
        return False
    return True
