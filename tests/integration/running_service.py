"""A real service on a real local Ray, started as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

READY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60
WAITING_LIMIT = 24
STEPSERVE = str(Path(sys.executable).with_name("stepserve"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Service:
    """A running `stepserve serve` and what it printed."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    limit_waiting: bool = True
    stands_in: Path | None = None
    """The folder it is started in; None: this one."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    def start(self) -> None:
        command = [STEPSERVE, "serve", "--port", str(self.port)]
        command += ["--first-image", str(self.folder / "out")]
        variable = "STEPSERVE_MODELS__EMOJI__ENGINE__MAX_PENDING_IMAGES"
        limit = {variable: str(WAITING_LIMIT)} if self.limit_waiting else {}
        with (self.folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.stands_in,
                env=os.environ | limit | self.variables,
                # Like a shell does: Ctrl-C reaches the whole group, Ray's processes included.
                start_new_session=True,
            )
        self._wait_until_greeted()

    def interrupt(self) -> int:
        """Ctrl-C, and the exit code."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)

    def terminate(self) -> int:
        """SIGTERM to the service alone, as container runtimes send it, and the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.interrupt()

    def _wait_until_greeted(self) -> None:
        assert self.process is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while "Ctrl-C stops" not in self.log:
            assert self.process.poll() is None, f"the service ended:\n{self.log}"
            assert time.monotonic() < deadline_s, f"the service was not ready:\n{self.log}"
            time.sleep(0.1)
