"""Ctrl-C and SIGTERM: accepted work is finished, then the service ends with exit code 0."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from running_service import Service


def test_accepted_work_is_finished_at_ctrl_c_and_the_exit_code_is_0(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start()
    body = {"prompt": "house", "num_inference_steps": 150}
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(
            httpx.post,
            f"{service.url}/v1/images/generations",
            json=body,
            timeout=60,
            trust_env=False,
        )
        time.sleep(0.7)
        assert not answer.done()
        started_s = time.monotonic()
        ready = pool.submit(readiness_until, service, 503)
        assert service.interrupt() == 0, service.log
        assert "draining" in ready.result()
        assert answer.result().status_code == 200, answer.result().text
    assert time.monotonic() - started_s < 30
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
            answer = pool.submit(
                httpx.post,
                f"{service.url}/v1/images/generations",
                json={"prompt": "house", "num_inference_steps": 1000},
                timeout=60,
                trust_env=False,
            )
            time.sleep(2)
            assert service.terminate() == 0, service.log
            assert answer.result().status_code == 503, answer.result().text
            assert answer.result().json()["error"]["code"] == "server_stopped"
    assert service.log.rstrip().endswith("stopped")


def readiness_until(service: Service, status: int) -> str:
    """The body of the first answer with that status; load balancers ask until then."""
    with httpx.Client(base_url=service.url, timeout=5, trust_env=False) as client:
        while (answer := client.get("/readyz")).status_code != status:
            time.sleep(0.1)
    return answer.text


def test_a_port_that_is_taken_is_refused_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert (
        ended.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    )
    assert ended.stdout == ""
