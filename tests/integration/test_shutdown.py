"""Ctrl-C and SIGTERM: accepted work is finished, then the service ends with exit code 0."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from running_service import Service, free_port


def test_accepted_work_is_finished_at_ctrl_c_and_the_exit_code_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For a machine that is busy with other things.
    monkeypatch.setenv("STEPSERVE_MODELS__EMOJI__ENGINE__DRAIN_S", "45")
    service = Service(tmp_path)
    service.start()
    body = {"prompt": "house", "num_inference_steps": 150}
    with ThreadPoolExecutor(2) as pool:
        response = pool.submit(
            httpx.post,
            f"{service.url}/v1/images/generations",
            json=body,
            timeout=60,
            trust_env=False,
        )
        time.sleep(0.7)
        assert not response.done()
        started_s = time.monotonic()
        ready = pool.submit(readiness_until, service, 503)
        assert service.interrupt() == 0, service.log
        assert "draining" in ready.result()
        assert response.result().status_code == 200, response.result().text
    assert time.monotonic() - started_s < 55
    assert service.log.rstrip().endswith("stopped")


def test_at_sigterm_who_is_cut_off_is_answered_although_spans_cannot_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever collects spans accepts connections, and says nothing."""
    monkeypatch.setenv("STEPSERVE_MODELS__EMOJI__ENGINE__DRAIN_S", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        collector = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        service = Service(tmp_path)
        service.start()
        with ThreadPoolExecutor(1) as pool:
            response = pool.submit(
                httpx.post,
                f"{service.url}/v1/images/generations",
                json={"prompt": "house", "num_inference_steps": 1000},
                timeout=60,
                trust_env=False,
            )
            time.sleep(2)
            assert service.terminate() == 0, service.log
            assert response.result().status_code == 503, response.result().text
            assert response.result().json()["error"]["code"] == "server_stopped"
    assert service.log.rstrip().endswith("stopped")


@contextmanager
def starved() -> Iterator[None]:
    """Others want every core several times over, and do not step back."""
    command = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(command) for _ in range(4 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def ask(service: Service, number: int) -> tuple[str, str]:
    """What a client hears at the end: of an answer, a stream, or of somebody else's request."""
    url, name = f"{service.url}/v1/images/generations", f"long-{number}"
    body = {"prompt": "house", "num_inference_steps": 1000, "seed": number}
    headers = {"X-Request-ID": name}
    with httpx.Client(timeout=90, trust_env=False) as client:
        if number % 3 == 0:
            response = client.post(url, json=body, headers=headers)
            return "answer", f"{response.status_code} {response.json()['error']['code']}"
        if number % 3 == 1:
            response = client.post(url, json=body | {"stream": True}, headers=headers)
            return "stream", response.text.strip().split("\n\n")[-1]
        followed = f"{service.url}/v1/requests/long-{number - 2}"
        while client.get(followed).status_code == 404:
            time.sleep(0.1)
        return "follower", client.get(f"{followed}/events").text.strip().split("\n\n")[-1]


def test_every_client_hears_of_the_end_although_the_machine_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPSERVE_MODELS__EMOJI__ENGINE__DRAIN_S", "1")
    service = Service(tmp_path)
    service.start()
    with ThreadPoolExecutor(9) as pool:
        asking = [pool.submit(ask, service, number) for number in range(9)]
        time.sleep(3)
        with starved():
            assert service.terminate() == 0, service.log
            heard = [one.result() for one in asking]
    ends = {"answer": "503 server_stopped", "stream": "event: error", "follower": "event: failed"}
    for kind, said in heard:
        assert said.startswith(ends[kind]), (kind, said)
        assert "server_stopped" in said


def test_asked_twice_it_waits_for_nothing_and_still_tells_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPSERVE_MODELS__EMOJI__ENGINE__DRAIN_S", "55")
    service = Service(tmp_path)
    service.start()
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, service, number) for number in range(3)]
        time.sleep(3)
        began_s = time.monotonic()
        assert service.process is not None
        service.process.terminate()
        time.sleep(2)
        assert service.terminate() == 0, service.log
        assert time.monotonic() - began_s < 30
        assert all("server_stopped" in one.result()[1] for one in asking)
    assert service.log.endswith("stopped\n")
    assert "Traceback" not in service.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_s", [1.0, 4.0, 8.0])
def test_a_signal_while_it_starts_ends_it_without_a_word_of_python(
    tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    command = [sys.executable, "-m", "stepserve.cli", "serve", "--port", str(free_port())]
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        starting = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        time.sleep(after_s)
        # As a terminal does with Ctrl-C, and a container runtime with SIGTERM.
        target = os.killpg if number is signal.SIGINT else os.kill
        target(starting.pid, number)
        assert starting.wait(60) in (0, 128 + number, -number), log.read_text()
    assert "Traceback" not in log.read_text()


def readiness_until(service: Service, status: int) -> str:
    """The body of the first answer with that status; load balancers ask until then."""
    with httpx.Client(base_url=service.url, timeout=5, trust_env=False) as client:
        while (response := client.get("/readyz")).status_code != status:
            time.sleep(0.1)
    return response.text


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
