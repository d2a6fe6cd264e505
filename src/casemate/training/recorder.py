"""Where a run writes what it saw. The library knows only this protocol; `casemate.tracking` fills it for MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Recorder(Protocol):
    """Takes parameters, curves and files. It must never cost a run: whatever fails in it stays in it."""

    def params(self, values: Mapping[str, Any]) -> None:
        """What the run was started with; nested mappings are allowed."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers at a step (training: epochs from 1). A resumed run gives the earlier epochs again."""

    def artifact(self, path: Path) -> None:
        """A file worth keeping with the run."""

    def model(self, path: Path, *, example: Any, registered: str, tags: Mapping[str, str]) -> None:
        """An ONNX file with an example input, to be registered under a name."""


class NullRecorder:
    """Keeps nothing."""

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        pass

    def artifact(self, path: Path) -> None:
        pass

    def model(self, path: Path, *, example: Any, registered: str, tags: Mapping[str, str]) -> None:
        pass


class ListRecorder:
    """Keeps everything, in order, as (kind, content): for tests and notebooks."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def params(self, values: Mapping[str, Any]) -> None:
        self.events.append(("params", dict(values)))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.events.append(("metrics", (step, dict(values))))

    def artifact(self, path: Path) -> None:
        self.events.append(("artifact", path))

    def model(self, path: Path, *, example: Any, registered: str, tags: Mapping[str, str]) -> None:
        self.events.append(("model", (path, registered, dict(tags))))

    def rows(self) -> list[tuple[int, dict[str, float]]]:
        """The metrics alone, as (step, values)."""
        return [content for kind, content in self.events if kind == "metrics"]
