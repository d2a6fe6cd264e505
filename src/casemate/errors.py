"""Errors a user can mend. Commands print their one line and exit with status 2; the traceback is for bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line that names the thing and the mend."""


def shorten(text: str, most: int = 80) -> str:
    """What somebody gave, fit for a line of a message: printable, and not longer than `most` characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return shown if len(text) <= most else f"{shown[:most]}... ({len(text):,} characters)"


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'trades'?`, else the list of what exists."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(known)
