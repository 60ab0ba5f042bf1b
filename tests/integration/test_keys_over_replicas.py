"""API keys on a real service with two ingress replicas: their limits are exact all the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hearing import all_hear_of_the_end
from running_service import QUICKLY_LOADED, Service
from stepserve.api.auth.keys import ApiKey, add_key, hash_key, new_key

GENERATIONS = "/v1/images/generations"
QUICK = {"prompt": "pizza", "num_inference_steps": 2}
LONG = QUICK | {"num_inference_steps": 1000, "n": 8, "stream": True, "previews": 50}
LIMITS = {
    "steady": {"requests_per_minute": 6},
    "single": {"max_concurrent": 1},
    "free": {},
}


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    return {name: new_key() for name in LIMITS}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, str]) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("guarded")
    for name, key in keys.items():
        entry = {"name": name, "sha256": hash_key(key), **LIMITS[name]}
        add_key(folder / "keys.yaml", ApiKey.model_validate(entry))
    engine = QUICKLY_LOADED | {"drain_s": 1}
    running = Service(
        folder,
        variables={
            "STEPSERVE_AUTH__KEYS_FILE": str(folder / "keys.yaml"),
            "STEPSERVE_HTTP__INGRESS_REPLICAS": "2",
        },
        engine=engine,
    )
    running.start()
    yield running
    running.kill()


def draw(service: Service, key: str, body: dict[str, object] = QUICK) -> httpx.Response:
    """On a connection of its own, so that any ingress replica may get it."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(timeout=60, trust_env=False, verify=False) as client:
        return client.post(service.url + GENERATIONS, json=body, headers=headers)


def test_the_first_image_is_left_to_who_has_a_key(guarded: Service):
    assert "first image: left out" in guarded.log
    assert 'Authorization: Bearer $STEPSERVE_API_KEY"' in guarded.log
    assert draw(guarded, "wrong").status_code == 401


def test_the_rate_is_exact_over_replicas(guarded: Service, keys: dict[str, str]):
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda _: draw(guarded, keys["steady"]), range(16)))
    statuses = [response.status_code for response in responses]

    assert sorted(statuses) == [200] * 6 + [429] * 10, [
        response.text[:200] for response in responses
    ]
    left = [
        int(response.headers["x-ratelimit-remaining-requests"])
        for response in responses
        if response.status_code == 200
    ]
    assert sorted(left) == [0, 1, 2, 3, 4, 5]
    assert all(int(a.headers["retry-after"]) >= 1 for a in responses if a.status_code == 429)
    assert draw(guarded, keys["free"]).status_code == 200


def test_one_at_once_over_replicas_and_a_client_that_leaves(guarded: Service, keys: dict[str, str]):
    headers = {"Authorization": f"Bearer {keys['single']}"}
    with (
        httpx.Client(timeout=60, trust_env=False) as client,
        client.stream("POST", guarded.url + GENERATIONS, json=LONG, headers=headers) as response,
    ):
        assert response.status_code == 200
        # Kept: httpx closes the connection once nobody holds the iterator.
        lines = response.iter_lines()
        assert next(lines).startswith("event: image_generation.partial_image")
        with ThreadPoolExecutor(8) as pool:
            others = list(pool.map(lambda _: draw(guarded, keys["single"]), range(8)))
        assert {other.status_code for other in others} == {429}
        assert next(lines).startswith("data: ")
    left_s = time.monotonic()
    while draw(guarded, keys["single"]).status_code == 429:
        # Far less than a lease lasts: it was given back.
        assert time.monotonic() < left_s + 10
        time.sleep(0.05)


def test_requests_are_found_whichever_ingress_is_asked(guarded: Service, keys: dict[str, str]):
    headers = {"Authorization": f"Bearer {keys['free']}", "X-Request-ID": "sought"}
    body = LONG | {"stream": False}
    with ThreadPoolExecutor() as pool:
        making = pool.submit(
            httpx.post, f"{guarded.url}{GENERATIONS}", json=body, headers=headers, timeout=120
        )
        url = f"{guarded.url}/v1/requests/sought"
        # Every call is a connection of its own, so that either ingress gets some.
        while httpx.get(url, headers=headers).status_code == 404:
            assert not making.done(), making.result().text
        told = [httpx.get(url, headers=headers, timeout=30) for _ in range(12)]
        with httpx.stream("GET", f"{url}/events", headers=headers, timeout=30) as events:
            lines = [line for line, _ in zip(events.iter_lines(), range(12), strict=False)]
        foreign = httpx.get(url, headers={"Authorization": f"Bearer {keys['steady']}"})
        cancelled = httpx.delete(url, headers=headers)
        ended = making.result()

    assert [response.status_code for response in told] == [200] * 12
    assert {response.json()["state"] for response in told} == {"running"}
    assert "event: accepted" in lines
    assert foreign.status_code == 404
    assert cancelled.status_code == 200
    assert ended.json()["error"]["code"] == "request_cancelled"


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


def test_every_client_hears_of_the_end_although_the_machine_is_busy(
    guarded: Service, keys: dict[str, str]
) -> None:
    def stop() -> None:
        with starved():
            guarded.stop()

    all_hear_of_the_end(guarded, 9, stop, keys["free"])
