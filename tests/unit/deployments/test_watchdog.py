"""A process that hangs in native code ends; one that works does not."""

from __future__ import annotations

import subprocess
import sys
import time

START = """
import re, time
from service.deployments.watchdog import watch_interpreter
watch_interpreter(after_s=1.0)
"""
# Backtracking for ages, in C, with the interpreter lock held.
HANG = "re.match('(a+)+$', 'a' * 64 + 'b')"


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START + code]
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
