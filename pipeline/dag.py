"""dvc.yaml as Snakemake needs it: one stage per rule, templating and matrices resolved by DVC itself.

DVC says what is stale; Snakemake says when and where it runs. A stamp file stands for "up to date".
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipeline.common import cores

STATE = Path(".snakemake")
STAMPS = STATE / "stamps"
STAMP_TIME = 1_000_000_000  # one time for every stamp, so that none is newer than another
META = {"threads": int, "mem_mb": int, "gpu": int, "local": bool}


@dataclass(frozen=True)
class Stage:
    """A resolved DVC stage: its address, what must run before it, and what it needs."""

    name: str
    upstream: list[str]
    threads: int = 1
    local: bool = False
    resources: dict[str, int] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """A legal rule name: `train@at_pgd` -> `train_at_pgd`."""
        return re.sub(r"\W", "_", self.name)

    @property
    def stamp(self) -> str:
        return str(STAMPS / self.rule)


def load(root: str = ".") -> dict[str, Stage]:
    """Every resolved stage with a command, by address. Raises SystemExit with one line on a bad `meta`."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    stages: dict[str, Stage] = {}
    try:
        with Repo(root) as repo:
            graph = repo.index.graph
            for found in repo.index.stages:
                if found.cmd:
                    upstream = sorted(u.addressing for u in graph.successors(found) if u.cmd)
                    stages[found.addressing] = _stage(found.addressing, upstream, dict(found.meta or {}))
    except DvcException as error:
        raise SystemExit(f"error: dvc.yaml: {' '.join(str(error).split())}") from None
    rules = [s.rule for s in stages.values()]
    for rule in rules:
        if rules.count(rule) > 1:
            raise SystemExit(f"error: dvc.yaml: two stages share the rule name {rule}; rename one row")
    return stages


def _stage(name: str, upstream: list[str], meta: dict[str, Any]) -> Stage:
    for key, value in meta.items():
        if key not in META:
            raise SystemExit(f"error: dvc.yaml: {name}: unknown meta {key!r}; known: {', '.join(META)}")
        if type(value) is not META[key]:
            raise SystemExit(f"error: dvc.yaml: {name}: meta {key} must be {META[key].__name__}, got {value!r}")
    threads = meta.pop("threads", 1) or cores()
    return Stage(name, upstream, threads, meta.pop("local", False), meta)


def sync_stamps(stages: dict[str, Stage], root: str = ".") -> None:
    """Make the stamps say what DVC says: a stamp exists if and only if its stage is up to date."""
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(root) as repo:
            stale = set(repo.status())
    except LockError:
        print("a stage is running: keeping the last known state", file=sys.stderr)
        return
    STAMPS.mkdir(parents=True, exist_ok=True)
    for stage in stages.values():
        stamp = Path(stage.stamp)
        if stage.name in stale:
            stamp.unlink(missing_ok=True)
            continue
        stamp.touch()
        os.utime(stamp, (STAMP_TIME, STAMP_TIME))
        # A killed run leaves a mark that would make Snakemake distrust a stage that DVC has verified.
        mark = base64.urlsafe_b64encode(stage.stamp.encode()).decode()
        (STATE / "incomplete" / mark).unlink(missing_ok=True)


def hold_engine_lock() -> IO[str] | None:
    """Held while a Snakemake run lives; None if another run holds it. Clears the lock of a run that was killed.

    Snakemake cannot tell a dead run's lock from a live one's and asks for `--unlock`; the kernel can: it gives up
    our file lock with the process that held it. Keep the returned handle open.
    """
    STATE.mkdir(exist_ok=True)
    handle = open(STATE / "engine.lock", "a")  # noqa: SIM115  held for the life of the process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    left = [*(STATE / "locks").glob("*.lock")] if (STATE / "locks").is_dir() else []
    for lock in left:
        lock.unlink(missing_ok=True)
    if left:
        print("an earlier run was killed: its lock has been cleared", file=sys.stderr)
    return handle
