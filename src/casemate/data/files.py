"""Datasets that are fetched: sources asked in order, content verified, canonical files written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from casemate.data import store
from casemate.data.archives import BadArchive, check_md5, find
from casemate.data.base import Dataset, Images, Split
from casemate.data.sources import LOCAL_VARIABLE, Local, Source, SourceFailed, reason
from casemate.errors import UserError

Arrays = Mapping[str, np.ndarray]


class FileDataset(Dataset):
    """A dataset of `counts` images a split whose canonical content has known checksums.

    A subclass says which sources to ask and how to read what they give; it is never told which one it was. Where no
    checksum of the decoded content is published, `checksums` is empty: `decode` then verifies the files it reads
    (see `verified`), and the manifest keeps the checksums of what came out, for every later look.
    """

    name: ClassVar[str]
    """The registered name, and that of its folder."""
    counts: ClassVar[Mapping[str, int]]
    """Images in `train` and `test`."""
    whole: ClassVar[bool] = True
    """Whether every copy holds all `counts`; else at most so many."""
    checksums: ClassVar[Mapping[str, str]] = {}
    """Of the canonical content of each of `store.ARRAYS`, as `digest` computes it; or empty."""
    algorithm: ClassVar[str] = "sha256"
    """Of `digest`, for the manifest."""
    sources: ClassVar[tuple[Source, ...]] = ()
    bring: ClassVar[str] = ""
    """The files a user could fetch by hand, for the message when no source serves."""
    space: ClassVar[int] = 0
    """Bytes of free disk space that fetching takes at most."""

    @abstractmethod
    def decode(self, folder: Path) -> Arrays:
        """Read the four arrays from whatever files a source left in `folder`.

        Images uint8 N x H x W x C, labels of any integer type. Raises SourceFailed or BadArchive.
        """

    def digest(self, name: str, array: np.ndarray) -> str:
        """The checksum of one array's content: sha256 of its bytes, labels as uint8."""
        return hashlib.sha256(as_bytes(array)).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that an array must have."""
        split, _, kind = name.partition("_")
        channels, height, width = self.input_shape
        return (self.counts[split], height, width, channels) if kind == "images" else (self.counts[split],)

    def verify(self, arrays: Arrays) -> None:
        """Raise BadArchive unless shapes and checksums fit."""
        for name in store.ARRAYS:
            problem = self.problem(name, arrays[name])
            if problem:
                raise BadArchive(f"{name} {problem}")

    def problem(self, name: str, array: np.ndarray, recorded: str | None = None) -> str:
        """What is wrong with an array; empty if nothing is. `recorded` is its checksum if none is published."""
        shape = self.shape(name)
        if not self.whole and 0 < len(array) <= shape[0]:
            shape = (len(array), *shape[1:])
        if array.shape != shape:
            return f"has shape {array.shape}, not {shape}"
        if name.endswith("labels") and not (array.min() >= 0 and array.max() < len(self.classes)):
            return f"has values outside 0..{len(self.classes) - 1}"
        expected = self.checksums.get(name, recorded)
        if expected is not None and self.digest(name, array) != expected:
            return "has the wrong checksum: truncated or altered"
        return ""

    def recorded(self, folder: Path) -> dict[str, str]:
        """Checksums that the manifest of a folder gives, where none are published; ValueError if it gives none."""
        if self.checksums:
            return {}
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["dataset"] != self.name:
                raise ValueError(f"manifest.json is of {manifest['dataset']}")
            return {name: str(manifest["arrays"][name][self.algorithm]) for name in store.ARRAYS}
        except (KeyError, TypeError, AttributeError):
            raise ValueError("manifest.json gives no checksums") from None

    def fetch(self, folder: Path) -> str:
        if self.is_complete(folder):
            return "already there"
        with store.disk_errors(folder), store.exclusive(folder) as staging:
            if self.is_complete(folder):
                return "another process, meanwhile"
            store.check_space(folder.parent, self.space)
            source, arrays = self.obtain(staging)
            typed = {
                n: a.astype(np.uint8 if n.endswith("images") else np.int64, copy=False) for n, a in arrays.items()
            }
            store.write_arrays(folder, staging, typed, self.manifest(typed))
            return source

    def obtain(self, staging: Path) -> tuple[str, Arrays]:
        """Ask the sources in order; the first whose content fits. Raises UserError with what was tried."""
        tried = []
        for number, source in enumerate(self.sources):
            work = staging / f"source{number}"
            work.mkdir()
            try:
                found = source.get(work)
                arrays = self.stored(found) or self.decode(found)
                self.verify(arrays)
                return source.label, arrays
            except (SourceFailed, BadArchive, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno in store.FULL:
                    raise
                tried.append(f"{source.label}: {reason(error)}")
                shutil.rmtree(work)
        local = all(isinstance(source, Local) for source in self.sources)
        mend = "It cannot be downloaded:" if local else "Connect to a network, install one of these clients, or"
        raise UserError(
            f"cannot fetch {self.name}; tried {'; '.join(tried)}. {mend} put {self.bring} in a folder and "
            f"set {LOCAL_VARIABLE} to it"
        )

    def stored(self, folder: Path) -> Arrays | None:
        """The arrays of a canonical folder (another checkout's, say) at or below `folder`, if their content fits."""
        for first in find(folder, [f"{store.ARRAYS[0]}.npy"])[f"{store.ARRAYS[0]}.npy"]:
            with contextlib.suppress(OSError, ValueError):
                recorded = self.recorded(first.parent)
                arrays = {name: store.read_array(first.parent, name) for name in store.ARRAYS}
                if not any(self.problem(name, array, recorded.get(name)) for name, array in arrays.items()):
                    return arrays
        return None

    def manifest(self, content: Arrays) -> dict[str, Any]:
        """What the folder holds, for a reader without this library."""
        sums = self.checksums or {name: self.digest(name, content[name]) for name in store.ARRAYS}
        arrays = {name: {"shape": content[name].shape, self.algorithm: sums[name]} for name in store.ARRAYS}
        return {"schema": 1, "dataset": self.name, "classes": self.classes, "arrays": arrays}

    def is_complete(self, folder: Path) -> bool:
        """Whether `folder` holds exactly the canonical content."""
        try:
            recorded = self.recorded(folder)
            return (folder / "manifest.json").is_file() and not any(
                self.checked(folder, name, recorded.get(name)) for name in store.ARRAYS
            )
        except (OSError, ValueError):
            return False

    def checked(self, folder: Path, name: str, recorded: str | None) -> str:
        """`problem` of a stored array, computed once for each state of its file."""
        state = (folder / f"{name}.npy").stat()
        return _checked(self, folder.resolve(), name, (state.st_ino, state.st_size, state.st_mtime_ns), recorded)

    def load(self, folder: Path, split: Split) -> Images:
        mend = f"run `python -m pipeline.download --dataset {self.name}` to fetch it again"
        found = {}
        for name in (f"{split}_images", f"{split}_labels"):
            try:
                problem = self.checked(folder, name, self.recorded(folder).get(name))
                found[name] = store.read_array(folder, name)
            except FileNotFoundError:
                raise UserError(f"{self.name} is not in {folder} ({name}.npy is missing): {mend}") from None
            except (OSError, ValueError) as error:
                raise UserError(f"{folder / name}.npy cannot be read ({error}): {mend}") from None
            if problem:
                raise UserError(f"{folder / name}.npy {problem}; {mend}")
        return Images(found[f"{split}_images"], np.array(found[f"{split}_labels"], dtype=np.int64))


@functools.cache
def _checked(dataset: FileDataset, folder: Path, name: str, state: tuple[int, int, int], recorded: str | None) -> str:
    return dataset.problem(name, store.read_array(folder, name), recorded)


def verified(paths: Sequence[Path], md5: str, name: str) -> Path:
    """The first of the files with that md5, which its publisher gives. Raises SourceFailed for the file `name`."""
    wrong = []
    for path in paths:
        try:
            check_md5(path, md5)
            return path
        except BadArchive as error:
            wrong.append(str(error))
    raise SourceFailed(", ".join(wrong) or f"no {name} there")


def as_bytes(array: np.ndarray) -> memoryview:
    """The content of an array of values 0..255 as bytes in C order. Raises ValueError if a value does not fit."""
    if array.dtype != np.uint8:
        small = array.astype(np.uint8)
        if not np.array_equal(small, array):
            raise ValueError("values outside 0..255")
        array = small
    return np.ascontiguousarray(array).data.cast("B")
