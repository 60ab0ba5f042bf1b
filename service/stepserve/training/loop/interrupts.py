"""Ctrl-C and SIGTERM, answered between two training steps and never within one."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first stop signal is only noted in `received`; a later one interrupts.

    Later means `patience_s` after the first: some senders, such as `timeout`, send a signal to the
    process and to its group at once, which is one wish and not two. Signals reach the main thread
    only, so in another thread this does nothing.
    """

    def __init__(self, patience_s: float = 1.0) -> None:
        self.received: int | None = None
        self.patience_s = patience_s
        self._received_at_s = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def leave(self) -> NoReturn:
        """End the program the way the noted signal would have.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM, with status 143.
        """
        if self.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.received is None:
            self.received, self._received_at_s = number, now_s
        elif now_s - self._received_at_s >= self.patience_s:
            self.leave()
