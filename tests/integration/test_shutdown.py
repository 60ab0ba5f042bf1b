"""Signals while a service starts, and an address that is taken.

How one ends that serves is the last test of those that own a service: Ctrl-C with work in flight in
`test_many_models.py`, too little time on a busy machine in `test_keys_over_replicas.py`, nobody who
takes spans in `test_traces.py`, asked twice in `test_chaos.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from running_service import free_port

PATIENCE_S = 120.0


def begins(process: psutil.Process) -> bool:
    """Whether Python has read what it is to run."""
    return process.cpu_times().user > 0.3


def starts_ray(process: psutil.Process) -> bool:
    return any(child.name() == "raylet" for child in process.children(recursive=True))


def loads_model(process: psutil.Process) -> bool:
    children = process.children(recursive=True)
    return any("ServeReplica:stepserve-model" in " ".join(c.cmdline()) for c in children)


def end_while_it_starts(
    log: Path, moment: Callable[[psutil.Process], bool], number: signal.Signals
) -> int:
    """The exit code of a service that gets a signal at that moment."""
    command = [sys.executable, "-m", "stepserve.cli", "serve", "--port", str(free_port())]
    with log.open("wb") as out:
        starting = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    process, deadline_s = psutil.Process(starting.pid), time.monotonic() + PATIENCE_S
    while not moment(process):
        assert starting.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)
    # As a terminal does with Ctrl-C, and a container runtime with SIGTERM.
    target = os.killpg if number is signal.SIGINT else os.kill
    target(starting.pid, number)
    return starting.wait(60)


@pytest.mark.parametrize(
    "moment", [begins, pytest.param(starts_ray, marks=pytest.mark.slow), loads_model]
)
def test_a_signal_while_it_starts_ends_it_without_a_word_of_python(
    tmp_path: Path, moment: Callable[[psutil.Process], bool]
) -> None:
    logs = {number: tmp_path / number.name for number in (signal.SIGTERM, signal.SIGINT)}
    with ThreadPoolExecutor(len(logs)) as pool:
        ending = {
            number: pool.submit(end_while_it_starts, log, moment, number)
            for number, log in logs.items()
        }
    for number, log in logs.items():
        assert ending[number].result() in (0, 128 + number, -number), log.read_text()
        assert "ready:" not in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_port_that_is_taken_is_refused_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "stepserve.cli", "serve", "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert (
        ended.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    )
    assert ended.stdout == ""
