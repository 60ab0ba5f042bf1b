"""A process that hangs in native code ends; one that works does not."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from stepserve.ray_serve.replica.watchdog import BEATS, watch_interpreter, watch_work

START = """
import re
from stepserve.ray_serve.replica.watchdog import watch_interpreter
watch_interpreter(after_s=0.5)
"""
START_ENGINE = """
import threading
from stepserve.engine.loop.engine import Engine, EngineOptions
from stepserve.ray_serve.replica.watchdog import watch_work

engine = Engine(EngineOptions())
engine.start()
"""
# Backtracking for ages, in C, with the interpreter lock held.
HANG = "re.match('(a+)+$', 'a' * 64 + 'b')"


def run(code: str, start: str = START) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_whose_interpreter_stands_still_ends_and_says_where() -> None:
    began_s = time.monotonic()
    ended = run(f"def stuck():\n    {HANG}\nstuck()")
    assert ended.returncode == 1
    assert "Timeout (0:00:00.500000)!" in ended.stderr
    assert "in stuck" in ended.stderr
    assert time.monotonic() - began_s < 15


def sleeping(times: int) -> tuple[Callable[[float], None], SimpleQueue[float]]:
    """Instead of `time.sleep`: returns at once, but for the last time. Tells of each time."""
    slept: SimpleQueue[float] = SimpleQueue()
    left = iter(range(times - 1))

    def sleep(seconds: float) -> None:
        slept.put(seconds)
        if next(left, None) is None:
            # In a thread that ends with this process.
            threading.Event().wait()

    return sleep, slept


def test_while_python_runs_the_end_is_put_off_again_and_again() -> None:
    sleep, slept = sleeping(3)
    put_off: SimpleQueue[float] = SimpleQueue()
    watch_interpreter(8.0, put_off.put, sleep)
    assert [put_off.get(timeout=10) for _ in range(3)] == [8.0] * 3
    assert slept.get(timeout=10) == 8.0 / BEATS


def test_a_process_whose_engine_hangs_ends_whatever_it_holds() -> None:
    """It may have stopped with the lock that the event loop waits for, so that nobody can ask."""
    began_s = time.monotonic()
    ended = run(
        """
hangs = threading.Event()

def hang():
    engine._lock.acquire()
    hangs.set()
    threading.Event().wait()

threading.Thread(target=engine.call, args=(hang,), daemon=True).start()
hangs.wait()
watch_work(engine.silent_s, after_s=0.1)
engine.load()
""",
        START_ENGINE,
    )
    assert ended.returncode == 1
    assert "in hang" in ended.stderr
    assert time.monotonic() - began_s < 30


def test_an_engine_that_shows_life_is_looked_at_again_and_again() -> None:
    sleep, slept = sleeping(3)
    silent_s = iter((0.0, 1.5, 0.4))
    watch_work(lambda: next(silent_s), 1.5, sleep)
    assert [slept.get(timeout=10) for _ in range(3)] == [1.5 / BEATS] * 3
