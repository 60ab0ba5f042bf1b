"""A process that hangs in native code ends; one that works does not."""

from __future__ import annotations

import subprocess
import sys
import time

START = """
import re, time
from stepserve.ray_serve.replica.watchdog import watch_interpreter
watch_interpreter(after_s=1.0)
"""
START_ENGINE = """
import os, threading, time
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
    assert "Timeout (0:00:01)!" in ended.stderr
    assert "in stuck" in ended.stderr
    assert time.monotonic() - began_s < 15


def test_a_process_that_waits_goes_on() -> None:
    ended = run("time.sleep(2.5)\nprint('done')")
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_a_process_whose_engine_hangs_ends_whatever_it_holds() -> None:
    """It may have stopped with the lock that the event loop waits for, so that nobody can ask."""
    began_s = time.monotonic()
    ended = run(
        """
watch_work(engine.silent_s, after_s=1.0)

def hang():
    engine._lock.acquire()
    time.sleep(1000)

threading.Thread(target=engine.call, args=(hang,), daemon=True).start()
time.sleep(0.2)
engine.load()
""",
        START_ENGINE,
    )
    assert ended.returncode == 1
    assert "in hang" in ended.stderr
    assert time.monotonic() - began_s < 30


def test_a_process_whose_engine_idles_goes_on() -> None:
    ended = run(
        """
watch_work(engine.silent_s, after_s=1.5)
time.sleep(3)
print("done", flush=True)
os._exit(0)
""",
        START_ENGINE,
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
