"""Casemate trains robust image classifiers, attacks them, and ships the survivors as ONNX."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime reads this while it is imported, by whichever module or library does so first: it would write a device
# id and a queue of events under the user's home, and send them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from casemate.loading import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`casemate.load` without importing a runtime until it is used."""
    if name == "load":
        from casemate.loading import load

        return load
    raise AttributeError(f"module 'casemate' has no attribute {name!r}")
