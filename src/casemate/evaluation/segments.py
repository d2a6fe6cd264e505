"""Segments: the immutable files of the ledger. Parquet with checksums of its content, written aside and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS: dict[str, type[np.generic]] = {
    "index": np.int64, "label": np.int64, "clean_prediction": np.int64, "prediction": np.int64, "success": np.bool_,
    "linf": np.float32, "l2": np.float32, "forwards": np.int64, "backwards": np.int64, "queries": np.int64,
}  # fmt: skip
"""`prediction` is the system's own decision on the attacked image, -1 for rejected; `success` is what the attacker
was after, and is true for every clean error; linf and l2 are in pixel units; the rest are passes spent."""

Rows = dict[str, np.ndarray]


class ForeignError(ValueError):
    """A segment that was written under another key: sound, and not what was asked for."""


def write(
    path: Path, key: Mapping[str, Any], rows: Rows, x_adv: np.ndarray | None = None, remarks: Sequence[str] = ()
) -> None:
    """Write `rows` (a column each of COLUMNS, N long), adversarial images (N x C x H x W float32) if given, and what
    the attack remarked on the system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    columns: dict[str, Any] = {name: pa.array(rows[name]) for name in COLUMNS}
    meta = {"key": _text(key), "rows": _checksum(rows[name] for name in COLUMNS)}
    if remarks:
        meta["remarks"] = json.dumps(list(remarks))
    if x_adv is not None:
        flat = [image.tobytes() for image in np.ascontiguousarray(x_adv, dtype=np.float32)]
        columns["x_adv"] = pa.array(flat, pa.binary(len(flat[0])))
        meta |= {"shape": json.dumps(x_adv.shape[1:]), "images": _checksum([x_adv.astype(np.float32)])}
    table = pa.table(columns).replace_schema_metadata(meta)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, key: Mapping[str, Any], *, verify_images: bool = False) -> tuple[Rows, list[str]]:
    """The rows of a segment, and what the attack remarked on the system. Raises ForeignError if it is not the one
    asked for, a ValueError, KeyError or OSError without a number if it does not fit its checksums or is no segment,
    and what the system says if it cannot be read.
    """
    with pq.ParquetFile(path) as file:
        table = file.read(columns=list(COLUMNS))
    meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    if meta.get("key") != _text(key):
        raise ForeignError(_differs(json.loads(meta.get("key", "{}")), key))
    rows = {name: table[name].to_numpy().astype(dtype) for name, dtype in COLUMNS.items()}
    if meta["rows"] != _checksum(rows[name] for name in COLUMNS):
        raise ValueError("its checksum does not fit")
    if verify_images:
        read_images(path)
    return rows, json.loads(meta.get("remarks", "[]"))


def read_indices(path: Path) -> list[int]:
    """The indices of a segment's images, which are not read."""
    with pq.ParquetFile(path) as file:
        found: list[int] = file.read(columns=["index"])["index"].to_pylist()
    return found


def read_images(path: Path) -> dict[int, np.ndarray]:
    """Adversarial images (C x H x W float32) by index. Raises ValueError if they do not fit their checksum."""
    with pq.ParquetFile(path) as file:
        table = file.read(columns=["index", "x_adv"])
    meta = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    shape = json.loads(meta["shape"])
    flat = np.frombuffer(b"".join(table["x_adv"].to_pylist()), np.float32).reshape(-1, *shape)
    if meta["images"] != _checksum([flat]):
        raise ValueError("the checksum of its images does not fit")
    return dict(zip(table["index"].to_pylist(), flat, strict=True))


def about_content(error: Exception) -> bool:
    """Whether `read` failed because of what stands in the file. An error of the machine (no more files may be opened,
    no permission, a disk or a share that does not answer, no memory) says nothing about that."""
    if isinstance(error, MemoryError):
        return False
    return not isinstance(error, OSError) or error.errno is None


def set_aside(path: Path, why: str) -> Path:
    """Give a segment a name (`.torn`, `.foreign`) under which no ledger finds it, and none is overwritten."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.{why}" + (f".{number}" if number > 1 else ""))
        if not aside.exists():
            break
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
    return aside


KEY_PARTS = {
    "system": "of other weights", "system_code": "of other code of the system", "view": "of another view",
    "threat": "of another threat model", "attack": "of another attack, or of other code of it",
    "seed": "of another seed",
}  # fmt: skip


def _differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    parts = [said for part, said in KEY_PARTS.items() if part in wanted and found.get(part) != wanted[part]]
    return f"it holds results {' and '.join(parts) or 'under another key'}"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def _remove_leftovers(folder: Path, age: float = 3600.0) -> None:
    """Temporary files that a killed process left; a living one renames its own within moments."""
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > age:
                left.unlink()
