"""Stopping on SIGINT and SIGTERM at the end of a step instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is only noted; the second acts as if this were not here.

    Signals can only be handled in the main thread; elsewhere this does nothing.

    Args:
        repeat_seconds: so long after the first one, others are taken for the same: a scheduler that signals all processes of
            a job and a launcher that passes on what it gets both send one.

    Attributes:
        received: number of the signal that was noted, or None.
    """

    _HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, repeat_seconds: float = 0.0) -> None:
        self.received: int | None = None
        self._repeat_seconds, self._received_at = repeat_seconds, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self._HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def act(self) -> None:
        """Let a signal that was noted do what it would have done; nothing if there was none."""
        if self.received is not None:
            self._restore()
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at >= self._repeat_seconds:
            self.received = number
            self.act()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
