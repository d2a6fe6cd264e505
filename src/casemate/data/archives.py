"""Archives are checked (checksum, member paths, sizes) before a byte of them is written out."""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

CHUNK = 1 << 20


class BadArchive(Exception):
    """Why an archive was refused: one line."""


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5_file(path: Path) -> str:
    """The md5 of a file's bytes, as hexadecimal: what the publishers of older data sets give."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_md5(path: Path, expected: str) -> None:
    """Raise BadArchive unless the file's md5 is `expected`."""
    if md5_file(path) != expected:
        raise BadArchive(f"{path.name} ({path.stat().st_size:,} bytes) has the wrong checksum: truncated or altered")


def check_sha256(path: Path, expected: str) -> None:
    """Raise BadArchive unless the file's sha256 is `expected`."""
    if sha256_file(path) != expected:
        raise BadArchive(f"{path.name} ({path.stat().st_size:,} bytes) has the wrong checksum: truncated or altered")


def unpack_tar(stream: IO[bytes], folder: Path, wanted: str, *, limit: int) -> list[Path]:
    """Write the regular members whose path matches the regular expression `wanted` flat into `folder`.

    Every member's path is checked, wanted or not. Raises BadArchive, before anything is written for that
    member, on an absolute path, a `..`, a wanted link or device, two members of one name, or more than
    `limit` bytes in all.
    """
    written: list[Path] = []
    for name, source in _members(stream, wanted, limit):
        target = folder / name
        with target.open("wb") as out:
            while chunk := _piece(source):
                out.write(chunk)
        written.append(target)
    return written


def read_tar(path: Path, wanted: str, *, limit: int) -> dict[str, bytes]:
    """The content of the members that `unpack_tar` would write, by name; nothing is written. The same BadArchive."""
    found: dict[str, bytes] = {}
    with path.open("rb") as stream:
        for name, source in _members(stream, wanted, limit):
            found[name] = b"".join(iter(lambda source=source: _piece(source), b""))  # type: ignore[misc]
    return found


TORN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


def _members(stream: IO[bytes], wanted: str, limit: int) -> Iterator[tuple[str, IO[bytes]]]:
    """(file name, content) of the wanted members, each checked before it is given out."""
    seen: set[str] = set()
    total = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                name = inside(member.name)
                if not re.fullmatch(wanted, str(name)):
                    continue
                if not member.isreg():
                    raise BadArchive(f"member {member.name!r} is not a regular file")
                total += member.size
                if total > limit:
                    raise BadArchive(f"unpacks to more than the {limit:,} bytes it should hold")
                if name.name in seen:
                    raise BadArchive(f"holds two files named {name.name!r}")
                source = archive.extractfile(member)
                assert source is not None  # a regular member always has content
                seen.add(name.name)
                yield name.name, source
    except TORN as error:
        raise torn(error) from None


def inside(member: str) -> PurePosixPath:
    """A member's path. Raises BadArchive if it is absolute or climbs out by `..`."""
    name = PurePosixPath(member)
    if name.is_absolute() or ".." in name.parts:
        raise BadArchive(f"member {member!r} points outside the archive")
    return name


def torn(error: Exception) -> BadArchive:
    """What to raise when an archive cannot be read to its end."""
    return BadArchive(f"is not a readable archive ({error}): truncated or altered")


def _piece(source: IO[bytes]) -> bytes:
    try:
        return source.read(CHUNK)
    except TORN as error:
        raise torn(error) from None


def read_limited(path: Path, limit: int) -> bytes:
    """The content of a plain or .gz file. Raises BadArchive if it is damaged or holds more than `limit` bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadArchive(f"{path.name} is not a readable .gz file ({error}): truncated or altered") from None
    if len(content) > limit:
        raise BadArchive(f"{path.name} holds more than the {limit:,} bytes it should")
    return content


def find(folder: Path, names: Iterable[str], depth: int = 4) -> dict[str, list[Path]]:
    """Files of those names in `folder` and up to `depth` folders below it, nearest first, else by path."""
    found: dict[str, list[Path]] = {name: [] for name in names}
    level = [folder]
    for _ in range(depth + 1):
        below: list[Path] = []
        for here in level:
            try:
                entries = sorted(here.iterdir())
            except OSError:
                continue
            for entry in entries:
                if entry.name in found and entry.is_file():
                    found[entry.name].append(entry)
                elif entry.is_dir() and not entry.is_symlink():
                    below.append(entry)
        level = below
    return found
