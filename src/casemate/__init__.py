"""Casemate trains robust image classifiers, attacks them, and ships the survivors as ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casemate.loading import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`casemate.load` without importing a runtime until it is used."""
    if name == "load":
        from casemate.loading import load

        return load
    raise AttributeError(f"module 'casemate' has no attribute {name!r}")
