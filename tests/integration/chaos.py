"""Load that goes on while something is broken, ways to break it, and an account of the load."""

from __future__ import annotations

import base64
import ctypes
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

GENERATIONS = "/v1/images/generations"
REPLICA, INGRESS = "model-emoji", "ingress"
PATIENCE_S = 120.0
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
STOPPED_S, RUNNING_S = 0.4, 0.1


@dataclass(frozen=True)
class Answer:
    """What a client got for a seed. Status 0: its connection was closed."""

    seed: int
    status: int
    image: bytes
    text: str
    sent_s: float
    ended_s: float


def draw(url: str, seed: int) -> Answer:
    """Ask for an image. Its seed decides its number of steps too."""
    steps = random.Random(seed).randint(8, 24)
    body = {"prompt": "pizza", "seed": seed, "num_inference_steps": steps}
    sent_s = time.monotonic()
    status, text, image = 0, "", b""
    try:
        response = httpx.post(url + GENERATIONS, json=body, timeout=PATIENCE_S, trust_env=False)
        status, text = response.status_code, response.text[:300]
        if status == 200:
            image = base64.b64decode(response.json()["data"][0]["b64_json"])
    except httpx.TransportError as error:
        text = repr(error)
    return Answer(seed, status, image, text, sent_s, time.monotonic())


@dataclass
class Load:
    """Clients that draw one image after another, for as long as a block runs.

    Args:
        repeat: whether a client that sees an error sends its request again until it is served.
    """

    url: str
    first_seed: int
    clients: int = 6
    repeat: bool = False
    responses: list[Answer] = field(default_factory=list)
    errors: list[Answer] = field(default_factory=list)
    broken_s: float = 0.0

    def __post_init__(self) -> None:
        self._seeds = itertools.count(self.first_seed)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def breaks_now(self) -> None:
        """From now on something is broken."""
        self.broken_s = time.monotonic()

    def wait_for_answers(self, count: int) -> None:
        """Until so many requests were answered."""
        wait(lambda: len(self.responses) >= count, "no answers")

    def wait_for_answers_after(self, count: int) -> None:
        """Until so many requests were answered that were sent after it broke."""
        wait(lambda: len(self._after()) >= count, "no more answers")

    @property
    def recovery_s(self) -> float:
        """From the fault to the first answer to a request that was sent after it."""
        return min(response.ended_s for response in self._after()) - self.broken_s

    @property
    def slowest_s(self) -> float:
        """The longest that a client waited."""
        return max(response.ended_s - response.sent_s for response in self.responses)

    def tell(self, name: str, retried: int) -> str:
        """The account, in a line."""
        lost = sum(response.status != 200 for response in self.responses)
        return (
            f"{name:24} sent {len(self.responses) + len(self.errors):3}, "
            f"answered {len(self.responses) - lost:3}, errors {len(self.errors)}, "
            f"retried {retried}, lost {lost}; first answer after {self.recovery_s:.1f} s, "
            f"slowest {self.slowest_s:.1f} s"
        )

    def check(self) -> None:
        """All were served, and some again give the same bytes.

        Those that took longest went through most.
        """
        failed = [response for response in self.responses if response.status != 200]
        assert failed == [], [response.text for response in failed]
        slowest = sorted(self.responses, key=lambda response: response.sent_s - response.ended_s)[
            :3
        ]
        again = [draw(self.url, response.seed).image for response in slowest]
        assert again == [response.image for response in slowest]

    def _run(self) -> None:
        while not self._stop.is_set():
            response = draw(self.url, next(self._seeds))
            while self.repeat and response.status != 200:
                self.errors.append(response)
                time.sleep(0.2)
                response = draw(self.url, response.seed)
            self.responses.append(response)

    def _after(self) -> Sequence[Answer]:
        return [response for response in self.responses if response.sent_s >= self.broken_s > 0]


def processes_of(root: psutil.Process, deployment: str) -> list[psutil.Process]:
    """The replicas of a deployment, by what Ray calls their processes."""
    return [p for p in root.children(recursive=True) if f":{deployment}" in command_of(p)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def busiest(processes: Sequence[psutil.Process]) -> psutil.Process:
    """The one that computes most at the moment."""
    before = {p: sum(p.cpu_times()[:2]) for p in processes}
    time.sleep(0.3)
    return max(processes, key=lambda p: sum(p.cpu_times()[:2]) - before[p])


def wait_for_replicas(url: str, count: int) -> None:
    """Until exactly so many answer."""
    wait(
        lambda: (told := replicas_told(url)) is not None and len(told) == count,
        f"there are not {count} replicas",
    )


def replicas_told(url: str) -> list[dict[str, Any]] | None:
    """What each replica has in flight; None where nobody tells."""
    try:
        response = httpx.get(f"{url}/v1/models/emoji/batch", timeout=10, trust_env=False)
        replicas: list[dict[str, Any]] = response.json()["replicas"]
    except (httpx.TransportError, KeyError, ValueError):
        return None
    return replicas


def retried_at(url: str) -> int:
    """Requests that went to another replica so far, as `/metrics` tells some seconds later."""
    page = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text
    lines = [line for line in page.splitlines() if line.startswith("stepserve_request_retries")]
    return round(sum(float(line.rpartition(" ")[2]) for line in lines))


def wait(until: Callable[[], bool], complaint: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not until():
        assert time.monotonic() < deadline_s, complaint
        time.sleep(0.1)


def hang_engine(replica: psutil.Process) -> None:
    """Stop its engine thread alone, as a debugger would; it ends with the process."""
    # The busiest of those that step back furthest behind the others.
    engine = max(
        replica.threads(),
        key=lambda thread: (os.getpriority(os.PRIO_PROCESS, thread.id), thread.user_time),
    )
    stop_threads([int(engine.id)])


def hang_process(replica: psutil.Process) -> None:
    """Stop all that can run Python, as native code does that never lets go of its lock.

    The youngest thread is the one that watches over the others.
    """
    tasks = Path(f"/proc/{replica.pid}/task")
    started = {int(task.name): started_at(task) for task in tasks.iterdir()}
    stop_threads(sorted(started, key=lambda thread: started[thread])[:-1])


def started_at(task: Path) -> tuple[int, int]:
    """In ticks since the machine started, and the order of those that started together."""
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return int(fields[19]), int(task.name)


def stop_threads(threads: Sequence[int]) -> None:
    """Only the thread that stopped another may hold it: the caller's must go on living."""
    libc = ctypes.CDLL(None, use_errno=True)
    for thread, request in itertools.product(threads, (PTRACE_SEIZE, PTRACE_INTERRUPT)):
        assert libc.ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())


def slow_down(replica: psutil.Process, for_s: float) -> None:
    """Let it have a fifth of its time only, for a while."""
    end_s = time.monotonic() + for_s
    while time.monotonic() < end_s:
        replica.send_signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        replica.send_signal(signal.SIGCONT)
        time.sleep(RUNNING_S)
