"""What `.venv` must hold for each command: a richer environment serves the poorer commands, never the other way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import __main__ as commands


@pytest.mark.parametrize(
    ("there", "asked", "installs"),
    [
        ("pipeline", "pipeline", False), ("pipeline,demo", "pipeline", False),
        ("pipeline,dev", "pipeline,demo", False),
        ("pipeline", "pipeline,demo", True), ("pipeline,demo", "pipeline,dev", True),
    ],
)  # fmt: skip
def test_nothing_is_installed_twice(
    there: str, asked: str, installs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    (tmp_path / "python").touch()
    monkeypatch.setattr(commands, "VENV", tmp_path)
    monkeypatch.setattr(commands, "PYTHON", tmp_path / "python")
    monkeypatch.setattr(commands, "call", calls.append)
    commands.set_up(there)
    assert len(calls) == 1 and calls[0][-1].endswith(f"[{there}]")
    commands.set_up(asked)
    assert (len(calls) == 2) is installs
