"""Errors a user can mend. Commands print their one line and exit with status 2; the traceback is for bugs."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

_ALLOWED = "give a place you may read and write"
_FILE_IN_THE_WAY = "give a folder whose path leads through no file"
MENDS = {
    errno.EACCES: _ALLOWED, errno.EPERM: _ALLOWED, errno.EROFS: _ALLOWED,
    errno.ENOTDIR: _FILE_IN_THE_WAY, errno.EEXIST: _FILE_IN_THE_WAY,
    errno.EISDIR: "give a file, not a folder", errno.ENOENT: "make it, or give another that exists",
}  # fmt: skip
"""What an operating system refuses because of what the user named, and what to do about it."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the thing and the mend."""


def shorten(text: str, most: int = 80) -> str:
    """What somebody gave, fit for a line of a message: printable, and not longer than `most` characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return shown if len(text) <= most else f"{shown[:most]}... ({len(text):,} characters)"


def first_line(error: BaseException, most: int = 200) -> str:
    """The start of what an error says, whose messages can be pages long, or nothing at all: then its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'trades'?`, else the list of what exists."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(known)


def check_file(option: str, path: Path) -> None:
    """Raise UserError unless a file can be written there: before hours of work, not after them."""
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give the name of a file, such as report.json")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise UserError(f"{option} {path}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path}: the folder {parent} cannot be written; give a place you may write to")


def check_folder(option: str, path: Path) -> None:
    """Raise UserError unless the folder is there, or can be made."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{option} {path}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{option} {path}: the folder {there} cannot be written; give a place you may write to")


@contextmanager
def one_line_errors(on_interrupt: str) -> Iterator[None]:
    """End the process with one line on stderr for what the user can mend: a `UserError`, a full disk or a file that
    cannot be had with status 2, Ctrl-C, of which `on_interrupt` says what it left, with 130. A bug keeps its
    traceback."""
    try:
        yield
    except UserError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end(on_interrupt, 130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _end(f"no space left on the disk that holds {error.filename or Path.cwd()}; free some and run again", 2)
        # of a file that is renamed the second name is what the user gave, the first a temporary one
        file = error.filename if error.filename2 is None else error.filename2
        if error.errno not in MENDS or not isinstance(file, str | bytes | os.PathLike):
            raise
        _end(f"cannot read or write {os.fsdecode(file)} ({error.strerror}): {MENDS[error.errno]}", 2)


def _end(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
