"""Checkpoints of one run: plain tensors and JSON, two slots that take turns, a lock.

`<root>/<hash of the identity>/` holds a.safetensors + a.json and b.safetensors + b.json. A slot's JSON is written
after its tensors and carries their SHA-256 and its own, so a slot is whole or is seen not to be.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from casemate.errors import UserError

SCHEMA = 1
SLOTS = ("a", "b")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
Body = dict[str, Any]


def identity_hash(identity: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for a JSON-able mapping; the order of its keys does not count."""
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Checkpoints:
    """The checkpoints of the run with that identity. Use it inside `locked()`."""

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        self.folder = root / identity_hash(identity)
        self._serial = 0
        self._next = SLOTS[0]

    @property
    def exists(self) -> bool:
        """Whether a whole checkpoint has been written or read."""
        return self._serial > 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock. The system frees it with the process, however that ends.

        Raises UserError if another process trains the same thing.
        """
        path = self.folder / "lock"
        handle = self._take(path)
        try:
            yield
        finally:
            handle.close()

    def _take(self, path: Path) -> IO[str]:
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = open(path, "a+")  # noqa: SIM115
            except FileNotFoundError:  # the run that held it has just finished and removed the folder
                continue
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise UserError(
                    f"cannot write checkpoints to {self.folder} ({error.strerror}): give a folder you may write to"
                ) from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                handle.close()
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise UserError(
                    f"process {owner} is training exactly this; wait for it or stop it (checkpoints in {self.folder})"
                ) from None
            if _same_file(handle, path):
                handle.truncate(0)
                handle.write(str(os.getpid()))
                handle.flush()
                return handle
            handle.close()

    def save(self, tensors: Mapping[str, Tensor], body: Body) -> None:
        """Write the older slot; the newer stays as it is until this one is whole. `body` is JSON-able."""
        from safetensors.torch import save

        slot, serial = self._next, self._serial + 1
        weights, card = self._files(slot)
        data = save({k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()})
        inner = {"schema": SCHEMA, "serial": serial, "tensors": hashlib.sha256(data).hexdigest(), "body": body}
        card.unlink(missing_ok=True)
        write_bytes(weights, data)
        write_bytes(card, json.dumps({**inner, "own": _hash(inner)}).encode())
        self._serial, self._next = serial, _other(slot)

    def load(self) -> tuple[dict[str, Tensor], Body] | None:
        """The newest whole checkpoint (tensors on the CPU), or None. A corrupt one is named on stderr."""
        from safetensors.torch import load_file

        found: list[tuple[int, str, Body]] = []
        for slot in SLOTS:
            weights, card = self._files(slot)
            if not card.exists():
                continue
            inner = _whole(weights, card)
            if inner is None:
                print(f"warning: checkpoint {card.with_suffix('')} is corrupt and left aside", file=sys.stderr)
            else:
                found.append((int(inner["serial"]), slot, inner["body"]))
        if not found:
            return None
        self._serial, slot, body = max(found, key=lambda item: item[0])
        self._next = _other(slot)
        return load_file(self._files(slot)[0]), body

    def remove(self) -> None:
        """Delete this run's checkpoints, while its lock is held."""
        for path in [f for slot in SLOTS for f in self._files(slot)]:
            path.unlink(missing_ok=True)
            path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
        (self.folder / "lock").unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError as error:  # somebody put a file there, or took the lock anew
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
                raise

    def _files(self, slot: str) -> tuple[Path, Path]:
        return self.folder / f"{slot}.safetensors", self.folder / f"{slot}.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, flush to the disk, then rename.

    An OSError of the disk carries the file's name; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _whole(weights: Path, card: Path) -> Body | None:
    """The content of a slot's JSON if it and the tensors are what was written."""
    try:
        inner: Body = json.loads(card.read_text())
        own = inner.pop("own")
        intact = own == _hash(inner) and inner["schema"] == SCHEMA and inner["tensors"] == file_hash(weights)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return inner if intact else None


def _hash(inner: Body) -> str:
    return hashlib.sha256(json.dumps(inner, sort_keys=True).encode()).hexdigest()


def _same_file(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _other(slot: str) -> str:
    return SLOTS[1 - SLOTS.index(slot)]
