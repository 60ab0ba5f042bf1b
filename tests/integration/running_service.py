"""A real service on a real local Ray, started as a user starts it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

READY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
PORTS = range(21000, 22000)
STEPSERVE = str(Path(sys.executable).with_name("stepserve"))
# What most tests need of a model: it loads with a fifth less work than one that is measured.
QUICKLY_LOADED = {"max_rows": 8, "threads": 1}


def free_port() -> int:
    """One that stays free until it is used: the system gives others to connections."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _environment() -> dict[str, str]:
    """Without what is meant for the tests' own computations."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


@dataclass
class Service:
    """A running `stepserve serve` and what it printed.

    `engine` has settings of the embedded model's engine; with a file of settings they belong there.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    engine: Mapping[str, float] = field(default_factory=dict)
    working_folder: Path | None = None
    """Where it is started; None: here."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    def start(self) -> None:
        command = [STEPSERVE, "serve", "--port", str(self.port)]
        command += ["--first-image", str(self.folder / "out")]
        prefix = "STEPSERVE_MODELS__EMOJI__ENGINE__"
        engine = {prefix + name.upper(): str(value) for name, value in self.engine.items()}
        with (self.folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.working_folder,
                env=_environment() | engine | self.variables,
                # Like a shell does: Ctrl-C reaches the whole group, Ray's processes included.
                start_new_session=True,
            )
        try:
            self._wait_until_greeted()
        except BaseException:
            # Nobody else would end it.
            self.kill()
            raise

    @property
    def root(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def token_file(self) -> Path:
        """Where the token of its Ray is, in the folder of its temporary files."""
        raylet = next(p for p in self.root.children(recursive=True) if p.name() == "raylet")
        return Path(raylet.environ()["RAY_AUTH_TOKEN_PATH"])

    def send(self, number: signal.Signals) -> None:
        """As a terminal sends Ctrl-C, to all its processes; the others as container runtimes do."""
        assert self.process is not None
        target = os.killpg if number is signal.SIGINT else os.kill
        target(self.process.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """It ends well, and leaves nothing behind."""
        assert self.process is not None
        folder = self.token_file().parent
        self.send(number)
        assert self.process.wait(STOP_TIMEOUT_S) == 0, self.log
        assert self.log.endswith("stopped\n"), self.log
        assert "Traceback" not in self.log, self.log
        assert not folder.exists()

    def kill(self) -> None:
        """End it if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGINT)
            self.process.wait(STOP_TIMEOUT_S)

    def _wait_until_greeted(self) -> None:
        assert self.process is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "Ctrl-C stops" not in self.log:
            assert self.process.poll() is None, f"the service ended:\n{self.log}"
            assert time.monotonic() < deadline_s, f"the service was not ready:\n{self.log}"
            time.sleep(0.1)
