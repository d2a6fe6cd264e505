"""How a run shows itself on stderr: a bar on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol


class Display(Protocol):
    """What the loop tells while it runs. Steps are counted over the whole budget."""

    def update(self, step: int, loss: float | None) -> None: ...

    def epoch(self, step: int, row: dict[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def display(wanted: bool, steps: int, epochs: float, done: int) -> Display:
    """The display that fits where stderr goes; `done` steps were made before this process."""
    if not wanted:
        return Silent()
    return Bar(steps, epochs, done) if sys.stderr.isatty() else Lines(steps, epochs, done)


def describe(row: dict[str, float], epochs: float) -> str:
    """`epoch 3/13  loss 0.532  clean 98.1 %  robust 85.0 %`."""
    parts = [f"epoch {row['epoch']:.4g}/{epochs:.4g}"]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4g}")
    for key in ("val_clean", "val_robust"):
        if key in row:
            parts.append(f"{key.removeprefix('val_')} {100 * row[key]:.1f} %")
    return "  ".join(parts)


class Silent:
    """Shows notes only."""

    def update(self, step: int, loss: float | None) -> None:
        pass

    def epoch(self, step: int, row: dict[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class Lines(Silent):
    """One plain line per epoch, with the time that is left."""

    def __init__(self, steps: int, epochs: float, done: int) -> None:
        self.steps, self.epochs, self.first = steps, epochs, done
        self.began = time.monotonic()

    def epoch(self, step: int, row: dict[str, float]) -> None:
        spent = time.monotonic() - self.began
        left = spent / max(1, step - self.first) * (self.steps - step)
        self.note(f"{describe(row, self.epochs)}  lr {row['lr']:.3g}  {_clock(spent)} spent, {_clock(left)} left")


class Bar:
    """A live bar with the last epoch's figures."""

    def __init__(self, steps: int, epochs: float, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.epochs = epochs
        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[live]}")]
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.bar.add_task("training", total=steps, completed=done, live="")
        self.bar.start()

    def update(self, step: int, loss: float | None) -> None:
        live = "" if loss is None else f"now {loss:.4g}"
        self.bar.update(self.task, completed=step, live=live)

    def epoch(self, step: int, row: dict[str, float]) -> None:
        self.bar.update(self.task, completed=step, description=describe(row, self.epochs))

    def note(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
