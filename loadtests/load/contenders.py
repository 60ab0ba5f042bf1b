"""The servers of a race: how each is started, and what was tuned for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

STOP_TIMEOUT_S = 60.0
PEERS_PYTHON = Path("out/peers/bin/python")
SHORT_SPIN = {"GOMP_SPINCOUNT": "100000"}
"""What Stepserve sets for itself: threads that wait spin for a millisecond and no more."""

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
OPENMP = {"short-spin": SHORT_SPIN, "passive": PASSIVE}
FULL_QUEUE = {"STEPSERVE_MODELS__EMOJI__ENGINE__MAX_PENDING_IMAGES": "100000"}


@dataclass(frozen=True)
class Contender:
    """One server.

    Args:
        command: the arguments after the interpreter; `{port}` is filled in.
        python: None: the interpreter that runs the race.
        tuned: how it was set up, for the report.
        role: `ours`, `one-at-a-time`, or `batching`.
    """

    name: str
    command: tuple[str, ...]
    tuned: str
    role: str
    environment: dict[str, str] = field(default_factory=dict)
    python: Path | None = None


def contenders(cores: int, peers_python: Path = PEERS_PYTHON) -> dict[str, Contender]:
    """All of them by name, set up for the cores of a CPU; ours first."""
    per_core = {
        "PEER_REPLICAS": str(cores),
        "PEER_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    batching = "up to 8 requests a batch, a wait of 20 ms; pipeline calls on a thread of their own"
    listed = (
        Contender(
            "stepserve",
            ("-m", "stepserve.cli", "serve", "--port", "{port}"),
            f"{cores} replicas of one thread, as docs/performance.md has it for CPUs; the queue is "
            "so long that nothing is refused",
            "ours",
            {
                "STEPSERVE_MODELS__EMOJI__REPLICAS": str(cores),
                "STEPSERVE_MODELS__EMOJI__ENGINE__THREADS": "1",
            },
        ),
        Contender(
            "fastapi-lock",
            ("-m", "loadtests.peers.fastapi_server"),
            "one request at a time on all cores",
            "one-at-a-time",
            {"PEER_WORKERS": "1"},
        ),
        Contender(
            "fastapi-threads",
            ("-m", "loadtests.peers.fastapi_server"),
            f"{cores} requests at a time, each with one torch thread",
            "concurrent",
            {"PEER_WORKERS": str(cores), "PEER_THREADS": "1", "OMP_NUM_THREADS": "1"},
        ),
        Contender(
            "ray-replica",
            ("-m", "loadtests.peers.ray_replica"),
            "Ray Serve's documented application, ingress and one replica; requests wait in it",
            "one-at-a-time",
        ),
        Contender(
            "ray-batch-keyed",
            ("-m", "loadtests.peers.ray_batch"),
            f"`@serve.batch`, {batching}; groups of equal parameters",
            "batching",
        ),
        Contender(
            "ray-batch-padded",
            ("-m", "loadtests.peers.ray_batch"),
            f"`@serve.batch`, {batching}; the longest request decides the steps of all",
            "batching",
            {"PEER_PAD_STEPS": "1"},
        ),
        Contender(
            "litserve",
            ("-m", "loadtests.peers.litserve_server"),
            "dynamic batching, up to 8 requests, a wait of 20 ms; groups of equal parameters",
            "batching",
            python=peers_python,
        ),
        Contender(
            "ray-batch-keyed-cores",
            ("-m", "loadtests.peers.ray_batch"),
            f"`@serve.batch`, {batching}; groups of equal parameters; "
            f"{cores} replicas of one thread",
            "batching",
            per_core,
        ),
        Contender(
            "litserve-cores",
            ("-m", "loadtests.peers.litserve_server"),
            "dynamic batching, up to 8 requests, a wait of 20 ms; groups of equal parameters; "
            f"{cores} workers of one thread",
            "batching",
            per_core,
            python=peers_python,
        ),
        Contender(
            "bentoml",
            ("-m", "bentoml", "serve", "loadtests.peers.bentoml_server:Emoji", "--port", "{port}"),
            "adaptive batching, up to 8 requests; groups of equal parameters; nothing is refused",
            "batching",
            {"BENTOML_DO_NOT_TRACK": "1"},
            python=peers_python,
        ),
    )
    return {contender.name: contender for contender in listed}


def on_cuda(model: Path) -> dict[str, Contender]:
    """Those that one GPU can be given to: each holds the model once."""
    gpu = {"PEER_MODEL": str(model), "PEER_DEVICE": "cuda"}
    ours = {
        "STEPSERVE_MODELS__EMOJI__PATH": str(model),
        "STEPSERVE_MODELS__EMOJI__NUM_GPUS": "1",
    }
    listed = contenders(1)
    names = ("fastapi-lock", "ray-replica", "ray-batch-keyed", "ray-batch-padded")
    peers = [replace(listed[name], environment=listed[name].environment | gpu) for name in names]
    one_gpu = "one replica on the GPU; the queue is so long that nothing is refused"
    return {
        "stepserve": replace(listed["stepserve"], environment=ours, tuned=one_gpu),
        **{peer.name: peer for peer in peers},
    }


@contextmanager
def running(
    contender: Contender, log: Path, openmp: str = "short-spin", more: dict[str, str] | None = None
) -> Iterator[str]:
    """Start a server on a free port, and stop it and all its processes at the end.

    The caller waits until it answers.
    """
    # Else the server would outlive a measurement that is ended from outside.
    as_before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    port = free_port()
    cores = len(os.sched_getaffinity(0))
    variables = {"PEER_PORT": str(port), "OMP_NUM_THREADS": str(cores), **OPENMP[openmp]}
    variables |= contender.environment | (more or {})
    arguments = [part.replace("{port}", str(port)) for part in contender.command]
    interpreter = str(contender.python or sys.executable)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [interpreter, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process)
        signal.signal(signal.SIGTERM, as_before)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask nicely, then end what is left of its process group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
