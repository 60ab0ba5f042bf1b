"""What clients hear at the end of a service that works for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

import httpx
from running_service import Service

GENERATIONS = "/v1/images/generations"
# Far more than a service has time for once it is to stop.
LONG = {"prompt": "house", "num_inference_steps": 1000}
PATIENCE_S = 90.0
ENDS = {"answer": "503 server_stopped", "stream": "event: error", "follower": "event: failed"}


def open_client(service: Service, key: str = "") -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(
        base_url=service.url, headers=headers, timeout=PATIENCE_S, trust_env=False, verify=False
    )


def wait_until_known(client: httpx.Client, request_id: str) -> None:
    """Until the service works on a request, or has it wait."""
    deadline_s = time.monotonic() + PATIENCE_S
    while client.get(f"/v1/requests/{request_id}").status_code == 404:
        assert time.monotonic() < deadline_s, f"{request_id} is not there"
        time.sleep(0.05)


def all_hear_of_the_end(
    service: Service, clients: int, stop: Callable[[], None], key: str = ""
) -> None:
    """Of each three clients one waits for an answer, one for a stream, one follows the first."""
    following = Semaphore(0)
    with ThreadPoolExecutor(clients) as pool, open_client(service, key) as client:
        asking = [pool.submit(_ask, service, key, n, following) for n in range(clients)]
        for number in range(clients):
            if number % 3 == 2:
                assert following.acquire(timeout=PATIENCE_S)
            else:
                wait_until_known(client, f"long-{number}")
        stop()
        heard = [one.result() for one in asking]
    for kind, said in heard:
        assert said.startswith(ENDS[kind]), (kind, said)
        assert "server_stopped" in said


def _ask(service: Service, key: str, number: int, following: Semaphore) -> tuple[str, str]:
    """What a client hears at last."""
    headers = {"X-Request-ID": f"long-{number}"}
    body = LONG | {"seed": number}
    with open_client(service, key) as client:
        if number % 3 == 0:
            response = client.post(GENERATIONS, json=body, headers=headers)
            return "answer", f"{response.status_code} {response.json()['error']['code']}"
        if number % 3 == 1:
            response = client.post(GENERATIONS, json=body | {"stream": True}, headers=headers)
            return "stream", response.text.strip().split("\n\n")[-1]
        followed = f"long-{number - 2}"
        wait_until_known(client, followed)
        with client.stream("GET", f"/v1/requests/{followed}/events") as events:
            following.release()
            told = events.read().decode()
        return "follower", told.strip().split("\n\n")[-1]
