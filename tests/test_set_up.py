"""What `.venv` must hold for each command: a richer environment serves the poorer commands, never the other way.
And what a user gets to read when a command cannot do its work."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from casemate.errors import UserError
from casemate.reporting import Leaderboard
from casemate.serving.server import listen
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


def test_a_summary_before_the_report_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leaderboard.json does not exist yet; 'dvc repro' makes it"):
        Leaderboard.read(tmp_path / "leaderboard.json")


def test_a_taken_port_is_said_before_the_page_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = rf"cannot listen on 127.0.0.1:{port} \(Address already in use\); choose another with --host or --port"
        with pytest.raises(UserError, match=said):
            commands.ui(port)
    assert "open" not in capsys.readouterr().out
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize(("command", "port"), [("ui", "0"), ("ui", "65536"), ("demo", "-1"), ("demo", "70000")])
def test_a_port_that_is_none_is_one_line(
    command: str, port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", command, f"--port={port}"])
    with pytest.raises(SystemExit) as ended:
        commands.parse()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: --port {port}: must be in ") and told.count("\n") == 1


def test_a_run_without_git_says_so_before_it_installs_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "call", lambda command, **_: pytest.fail(f"ran {command}"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="error: git is not installed"):
        commands.run(None, None, False, None)


@pytest.mark.parametrize(("cores", "engine"), [(None, ["dvc", "repro"]), (3, ["snakemake", "--cores", "3"])])
def test_stages_run_side_by_side_where_cores_are_named(
    cores: int | None, engine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(commands, "set_up", lambda extras: None)
    monkeypatch.setattr(commands, "call", lambda command, **_: calls.append(command[1:]))
    commands.run("quick", None, False, cores)
    assert ["-m", "pipeline", "profile", "quick"] in calls and calls[-2] == ["-m", *engine]


def test_no_cores_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", "run", "--cores=0"])
    with pytest.raises(SystemExit) as ended:
        commands.parse()
    assert ended.value.code == 2 and capsys.readouterr().err == "error: --cores 0: must be 1 or more\n"
