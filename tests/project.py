"""A copy of the project in a folder of its own, as a clone would be, and its commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Project:
    """The tracked and new files of the working tree, copied and committed; run with this interpreter."""

    def __init__(self, folder: Path, profile: str) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\n")  # fmt: skip
        for name in filter(None, listed):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        self.run("git", "init", "-q")
        self.run("git", "config", "user.email", "tests@example.invalid")
        self.run("git", "config", "user.name", "tests")
        self.python("-m", "pipeline", "profile", profile, "--force")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "a clone")

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        drop = ("PYTEST_", "MLFLOW_TRACKING_URI", "GIT_", "DVC_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        return {**kept, "PATH": path, "PYTHONPATH": f"{self.folder / 'src'}{os.pathsep}{self.folder}",
                "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}  # fmt: skip

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def python(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, *arguments, check=check, **environment)

    def dvc(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "dvc", *arguments, check=check, **environment)

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "snakemake", *arguments, check=check)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A command of this Python in the background, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def assert_nothing_to_do(self) -> None:
        """Both engines agree that the pipeline is up to date."""
        status = self.dvc("status").stdout
        assert "up to date" in status, status
        dry = self.snakemake("-n")
        assert "Nothing to be done" in dry.stdout + dry.stderr, dry.stdout + dry.stderr


def processes(folder: Path) -> list[int]:
    """Processes whose working directory is in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            where = (entry / "cwd").resolve()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if where.is_relative_to(folder) and state != "Z":
            found.append(int(entry.name))
    return found


def wait_until(condition: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.05)


def kill_hard(process: subprocess.Popen[str]) -> None:
    """kill -9 of the one process, its children left to themselves."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
