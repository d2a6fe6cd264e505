"""The canonical folder of a dataset: four .npy files and a manifest, written whole or not at all.

Nothing in it says where the bytes came from, or when, so every source gives the same files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from casemate.errors import UserError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"no space left while writing {folder}: free some disk space and run again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write {folder} ({error.strerror}): give a folder you may write to") from None
        raise


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e6:,.0f} MB of free disk space and has {free / 1e6:,.0f} MB: "
            "free some, or move the folder to a larger disk and link it"
        )


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[Path]:
    """Hold the lock of `folder` (a second process waits) and give an empty staging folder beside it.

    Staging folders that a killed process left are removed; ours is removed at the end. Raises UserError if `folder`
    holds anything that was not written here: it would be replaced.
    """
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} holds other files and would be replaced: move them away, or give another folder")
    with (parent / f".{folder.name}.lock").open("w") as lock:
        with contextlib.suppress(ImportError):  # no such lock on Windows: two fetches would then do double work
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        staging = parent / f".{folder.name}.{os.getpid()}.partial"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_arrays(folder: Path, staging: Path, arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> None:
    """Write the arrays and manifest.json to a new folder inside `staging`, then put it in the place of `folder`."""
    ready = staging / "ready"
    ready.mkdir()
    for name in ARRAYS:
        dtype = np.uint8 if name.endswith("images") else np.int64
        np.save(ready / f"{name}.npy", np.ascontiguousarray(arrays[name], dtype=dtype), allow_pickle=False)
    write_manifest(ready, manifest)
    for file in ready.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    put_in_place(ready, folder, staging)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json, the same bytes for the same content."""
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def put_in_place(ready: Path, folder: Path, staging: Path) -> None:
    """Rename `ready` to `folder`; what stood there before goes to `staging`, which its owner removes."""
    if folder.is_symlink() or folder.is_dir():
        folder.rename(staging / "replaced")
    ready.rename(folder)


def read_array(folder: Path, name: str) -> np.ndarray:
    """One array of a canonical folder, mapped and not read. Raises OSError or ValueError if it is not there."""
    array: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return array
