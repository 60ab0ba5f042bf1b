"""Ends a process whose interpreter stands still: what it had in hand is served elsewhere."""

from __future__ import annotations

import faulthandler
import threading
import time

BEATS = 4


def watch_interpreter(after_s: float) -> None:
    """From now on, end the process once no Python has run in it for `after_s` seconds.

    Native code that never gives the interpreter lock back stops every thread, health checks
    included, and Ray Serve waits for three of those to time out. The watchdog of `faulthandler` is
    a thread without Python: it writes where each thread stands to stderr, and exits with code 1.
    There is one in a process.
    """
    threading.Thread(target=_beat, args=(after_s,), name="watchdog", daemon=True).start()


def _beat(after_s: float) -> None:
    while True:
        faulthandler.dump_traceback_later(after_s, exit=True)
        time.sleep(after_s / BEATS)
