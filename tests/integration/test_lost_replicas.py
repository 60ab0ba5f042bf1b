"""Two replicas under load, and what happens when one is lost: nothing that a client sees."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest
from running_service import Service

GENERATIONS = "/v1/images/generations"
MODEL = "model-emoji"
INGRESS = "ingress"
STUCK_AFTER_S = 3
NICENESS = 10
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207

Fault = Callable[[psutil.Process], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    variables = {
        "STEPSERVE_MODELS__EMOJI__REPLICAS": "2",
        "STEPSERVE_MODELS__EMOJI__NUM_CPUS": "0.5",
        "STEPSERVE_MODELS__EMOJI__ENGINE__THREADS": "1",
        "STEPSERVE_MODELS__EMOJI__ENGINE__STUCK_AFTER_S": str(STUCK_AFTER_S),
    }
    running = Service(tmp_path_factory.mktemp("pair"), variables=variables)
    running.start()
    yield running
    running.kill()


def processes_of(service: Service, deployment: str) -> list[psutil.Process]:
    """The replicas of a deployment, by what Ray calls their processes."""
    assert service.process is not None
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [p for p in children if f":{deployment}" in command_of(p)]


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_for_replicas(service: Service, count: int = 2) -> None:
    deadline_s = time.monotonic() + 90
    with httpx.Client(trust_env=False, timeout=10) as client:
        while len(client.get(f"{service.url}/v1/models/emoji/batch").json()["replicas"]) < count:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)


@dataclass(frozen=True)
class Answer:
    seed: int
    status: int
    picture: bytes
    text: str


def draw(service: Service, seed: int) -> Answer:
    steps = random.Random(seed).randint(20, 60)
    body = {"prompt": "pizza", "seed": seed, "num_inference_steps": steps}
    with httpx.Client(trust_env=False, timeout=120) as client:
        answer = client.post(service.url + GENERATIONS, json=body)
    data = answer.json().get("data") or [{"b64_json": ""}]
    return Answer(
        seed, answer.status_code, base64.b64decode(data[0]["b64_json"]), answer.text[:300]
    )


def assert_all_answered(service: Service, answers: list[Answer]) -> None:
    assert {a.status for a in answers} == {200}, [a.text for a in answers if a.status != 200]
    again = random.Random(0).sample(answers, 4)
    assert [draw(service, answer.seed).picture for answer in again] == [a.picture for a in again]


def kill(replica: psutil.Process) -> None:
    replica.kill()


def hang_engine(replica: psutil.Process) -> None:
    """Stop its engine thread alone, as a debugger would; it ends with the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    thread = engine_thread(replica)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        assert libc.ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())


def engine_thread(replica: psutil.Process) -> int:
    """The busiest of those that step back behind the others."""
    threads = [t for t in replica.threads() if os.getpriority(os.PRIO_PROCESS, t.id) >= NICENESS]
    return int(max(threads, key=lambda thread: thread.user_time).id)


@pytest.mark.parametrize("fault", [kill, hang_engine])
def test_a_replica_that_dies_or_hangs_is_seen_by_nobody(pair: Service, fault: Fault) -> None:
    wait_for_replicas(pair)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(draw, pair, seed) for seed in range(100, 128)]
        time.sleep(1.0)
        # On this thread, as only the thread that stopped another may hold it.
        fault(busiest(pair))
        assert_all_answered(pair, [answer.result() for answer in answers])


def test_a_stream_goes_on_on_another_replica(pair: Service) -> None:
    wait_for_replicas(pair)
    body = {"prompt": "pizza", "num_inference_steps": 400, "stream": True, "previews": 8}
    names = []
    with (
        httpx.Client(trust_env=False, timeout=120) as client,
        client.stream("POST", pair.url + GENERATIONS, json=body) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: image_generation."))
                if len(names) == 2:
                    busiest(pair).kill()
    assert names == ["partial_image"] * 8 + ["completed"]


def busiest(service: Service) -> psutil.Process:
    replicas = processes_of(service, MODEL)
    before = {p: sum(p.cpu_times()[:2]) for p in replicas}
    time.sleep(0.3)
    return max(replicas, key=lambda p: sum(p.cpu_times()[:2]) - before[p])


def test_work_of_a_killed_ingress_stops(pair: Service) -> None:
    wait_for_replicas(pair)
    body = {"prompt": "pizza", "num_inference_steps": 1000, "n": 8}
    with ThreadPoolExecutor() as pool:
        making = pool.submit(httpx.post, pair.url + GENERATIONS, json=body, timeout=120)
        time.sleep(1.5)
        os.kill(processes_of(pair, INGRESS)[0].pid, signal.SIGKILL)
        # A clean error, or a closed connection: Ray Serve's proxy holds the client.
        with contextlib.suppress(httpx.TransportError):
            assert making.result().status_code >= 500
    deadline_s = time.monotonic() + 40
    while in_hand(pair):
        assert time.monotonic() < deadline_s, "nobody waits for it, and it still runs"
        time.sleep(0.3)


def in_hand(service: Service) -> int:
    try:
        answer = httpx.get(f"{service.url}/v1/models/emoji/batch", timeout=10)
        return sum(len(replica["requests"]) for replica in answer.json()["replicas"])
    except (httpx.TransportError, KeyError, ValueError):
        return 1
