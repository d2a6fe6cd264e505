"""Errors a user can mend. Commands print their one line and exit with status 2; the traceback is for bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line that names the thing and the mend."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'trades'?`, else the list of what exists."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(known)
