"""Ends a process whose interpreter or engine stands still: its work is served elsewhere."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial

BEATS = 4
LONGEST_LOOK_S = 1.0
LOGGING_S = 0.5
END_LATER = partial(faulthandler.dump_traceback_later, exit=True)

logger = logging.getLogger(__name__)


def watch_interpreter(
    after_s: float,
    end_later: Callable[[float], None] = END_LATER,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """From now on, end the process once no Python has run in it for `after_s` seconds.

    Native code that never gives the interpreter lock back stops every thread, health checks
    included, and Ray Serve waits for three of those to time out. The watchdog of `faulthandler` is
    a thread without Python: it writes where each thread stands to stderr, and exits with code 1.
    There is one in a process.

    Args:
        end_later: ends the process in so many seconds, unless it is called again before.
    """
    arguments = (after_s, end_later, sleep)
    threading.Thread(target=_beat, args=arguments, name="watchdog", daemon=True).start()


def _beat(
    after_s: float, end_later: Callable[[float], None], sleep: Callable[[float], None]
) -> None:
    while True:
        end_later(after_s)
        sleep(after_s / BEATS)


def watch_work(
    silent_s: Callable[[], float], after_s: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """From now on, end the process once its engine has been silent for more than `after_s` seconds.

    A thread of its own looks, and takes no lock: an engine that hangs may hold the one that the
    event loop waits for, and then health checks end in nothing but timeouts. Three of those, and
    the time that Ray Serve lets a replica finish in, took 52 seconds. Where each thread stands is
    written to stderr.

    Args:
        silent_s: seconds since the engine last showed life; must not wait for anything.
    """
    arguments = (silent_s, after_s, sleep)
    threading.Thread(target=_look, args=arguments, name="watchdog-engine", daemon=True).start()


def _look(silent_s: Callable[[], float], after_s: float, sleep: Callable[[float], None]) -> None:
    while silent_s() <= after_s:
        sleep(min(after_s / BEATS, LONGEST_LOOK_S))
    # The handlers of the log have locks as well, of which the engine may hold one.
    logs = threading.Thread(target=_log_silence, args=(silent_s(),), daemon=True)
    logs.start()
    logs.join(LOGGING_S)
    faulthandler.dump_traceback()
    os._exit(1)


def _log_silence(silent_s: float) -> None:
    logger.error("the engine has been silent for %.0f s: this replica ends", silent_s)
    logging.shutdown()
