"""Ends a process whose interpreter stands still: what it had in hand is served elsewhere."""

from __future__ import annotations

import faulthandler
import threading

BEATS = 4


class Watchdog:
    """Ends the process once no Python has run in it for `after_s` seconds.

    Native code that never gives the interpreter lock back stops every thread, health checks
    included, and Ray Serve waits for three of those to time out. The watchdog of `faulthandler` is
    a thread without Python: it writes where each thread stands to stderr, and exits with code 1.
    There is one in a process.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        while not self._stopped.is_set():
            faulthandler.dump_traceback_later(self._after_s, exit=True)
            self._stopped.wait(self._after_s / BEATS)
