"""Ctrl-C and SIGTERM let the current step finish, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """While open, the first signal only sets `requested`; a second Ctrl-C stops at once. Main thread only."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.requested is not None and error is None:  # it came too late for anyone here to act on it
            signal.raise_signal(self.requested)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number

    def stop(self) -> None:
        """End the run as the signal asked: KeyboardInterrupt, or exit status 143 for SIGTERM."""
        raise KeyboardInterrupt if self.requested == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
