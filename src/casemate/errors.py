"""Errors a user can mend. Commands print their one line and exit with status 2; the traceback is for bugs."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


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


@contextmanager
def one_line_errors(on_interrupt: str) -> Iterator[None]:
    """End the process with one line on stderr for what the user can mend: a `UserError` or a full disk with status 2,
    Ctrl-C, of which `on_interrupt` says what it left, with 130. A bug keeps its traceback."""
    try:
        yield
    except UserError as error:
        _end(str(error), 2)
    except KeyboardInterrupt:
        _end(on_interrupt, 130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _end(f"no space left on the disk that holds {error.filename or Path.cwd()}; free some and run again", 2)


def _end(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
