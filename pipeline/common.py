"""What every stage shares: its arguments, the validated parameters, threads, the recorder, and one-line errors."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casemate.params import Params

ROOT = Path(__file__).resolve().parent.parent
STATE = Path(".casemate")
"""Git-ignored: checkpoints, the ledger, the MLflow store."""

SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "ash", "busybox"}
"""What may stand between an engine and its stage."""

Run = Callable[["Params", argparse.Namespace], None]


def stage(
    run: Run, *, doc: str | None, arguments: dict[str, str] | None = None, optional: dict[str, str] | None = None
) -> None:
    """The `main` of a stage: `python -m pipeline.<name> [--params FILE] [--<argument> VALUE]`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="parameter file (params.yaml)")
    for name, text in (arguments or {}).items():
        parser.add_argument(f"--{name}", required=True, help=text)
    for name, text in (optional or {}).items():
        parser.add_argument(f"--{name}", help=text)
    options = parser.parse_args()
    end_with_engine()
    with one_line_errors():
        from casemate.params import load_params

        params = load_params(options.params)
        set_threads(params.threads)
        run(params, options)


def one_line_errors() -> AbstractContextManager[None]:
    """A user's mistake, a full disk or Ctrl-C end the stage with one line; a bug keeps its traceback."""
    from casemate import errors

    return errors.one_line_errors("interrupted; run the same command again to go on from the last checkpoint")


def end_with_engine() -> None:
    """End this stage if the engine that started it is killed: no orphan goes on behind the next run's back."""
    if sys.platform != "linux" or os.environ.get("DVC_STAGE") is None:
        return
    engine = os.getppid()
    with suppress(FileNotFoundError):  # killed already: the loop below ends the stage at once
        while _name(engine) in SHELLS:  # some shells wait for their command instead of becoming it
            engine = int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1])

    def follow() -> None:
        while Path(f"/proc/{engine}").exists():
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def set_threads(threads: int) -> None:
    """Fix the CPU threads of this process before torch is imported; 0 means all cores it may use."""
    os.environ["OMP_NUM_THREADS"] = str(threads or cores())
    # Waiting threads sleep instead of spinning: the same speed on idle cores, and over ten times faster on busy ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(params: Params) -> str:
    """`cpu` or `cuda`. Raises UserError if a GPU is asked for and absent."""
    import torch

    from casemate.errors import UserError

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if params.device == "cuda" and not torch.cuda.is_available():
        raise UserError("params.yaml: device is cuda and this machine has no usable GPU; set device: auto or cpu")
    return "cuda" if params.device != "cpu" and torch.cuda.is_available() else "cpu"


def row_of(params: Params, name: str, rows: Sequence[str], where: str) -> str:
    """`name` if it is one of `rows`. Raises UserError with the near matches."""
    from casemate.errors import UserError, near

    if name not in rows:
        raise UserError(f"no row {name!r} under {where} in params.yaml{near(name, rows)}")
    return name


def write_text(path: Path, content: str) -> None:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content)
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises UserError naming the stage that makes a missing file."""
    from casemate.errors import UserError

    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist yet; 'dvc repro' makes it") from None


def needed(path: Path, stage_name: str, row: str) -> Path:
    """`path`, if it is a file. Raises UserError naming the stage that makes it."""
    from casemate.errors import UserError

    if not path.is_file():
        raise UserError(f"{path} does not exist; run the stage first: python -m pipeline.{stage_name} --row {row}")
    return path


def md5(path: Path) -> str:
    """The MD5 that dvc.lock records for a file: it leads from a DVC output to its run."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def attack_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr for the cells of an evaluation; silent where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=None)
        yield lambda what, done, total: shown.update(task, description=what, completed=done, total=total)


@contextmanager
def recording(params: Params, stage_name: str, row: str | None = None) -> Iterator[Any]:
    """The MLflow run of a stage, a child of the pipeline's run; a local fallback or nothing if it cannot be had."""
    from casemate import tracking

    with tracking.stage_run(params, stage_name, row, STATE / "mlflow") as recorder:
        yield recorder
