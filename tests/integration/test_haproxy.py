"""HAProxy mode of Ray Serve: connections end in the ingress, no proxy of Ray is between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from running_service import Service

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("haproxy")
    service = Service(
        folder,
        variables={
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "STEPSERVE_MODELS__EMOJI__ROUTING": "power-of-two",
        },
    )
    try:
        service.start()
        yield service
    finally:
        service.kill()


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
        yield client


def test_haproxy_listens(service: Service) -> None:
    assert service.process is not None
    listening = {
        psutil.Process(connection.pid).name()
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.port == service.port
        and connection.pid
    }
    assert listening == {"haproxy"}


def test_events_of_a_stream_come_as_they_happen(client: httpx.Client) -> None:
    body = {"prompt": "house", "num_inference_steps": 60, "stream": True, "partial_images": 2}
    with client.stream("POST", GENERATIONS, json=body) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        came_s = [time.monotonic() for line in lines if line.startswith("data:")]
    assert len(came_s) >= 3
    assert came_s[-1] - came_s[0] > 0.2, "all came at once"


def test_work_of_a_client_that_leaves_stops(client: httpx.Client) -> None:
    with pytest.raises(httpx.TimeoutException):
        client.post(
            GENERATIONS, json={"prompt": "house", "n": 8, "num_inference_steps": 1000}, timeout=2
        )
    deadline_s = time.monotonic() + 10
    while any(one["requests"] for one in batch(client)):
        assert time.monotonic() < deadline_s, "its work goes on"
        time.sleep(0.2)


def batch(client: httpx.Client) -> list[dict[str, object]]:
    answer: list[dict[str, object]] = client.get("/v1/models/emoji/batch").json()["replicas"]
    return answer


def test_accepted_work_is_finished_at_the_end(service: Service) -> None:
    body = {"prompt": "house", "num_inference_steps": 150}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post, service.url + GENERATIONS, json=body, timeout=60, trust_env=False
        )
        time.sleep(0.7)
        assert not answer.done()
        assert service.terminate() == 0, service.log
        assert answer.result().status_code == 200, answer.result().text
