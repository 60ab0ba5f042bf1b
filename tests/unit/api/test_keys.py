"""API keys: who is let in, what each may use, and what is kept of them."""

from __future__ import annotations

import asyncio
import logging
import stat
from pathlib import Path

import httpx
import pytest
from api_fakes import SETTINGS, Blocking, FakeBackend, make_app
from hypothesis import given
from hypothesis import strategies as st

from service.api import ApiSettings
from service.api.keys import ApiKey, KeyRing, KeysUnreadableError, add_key, hash_key, read_keys
from service.api.usage import Grant, Refusal, UsageLedger
from service.domain.requests import Priority

URL = "/v1/images/generations"
BODY = {"prompt": "cat"}
WEB, BATCH, SMALL = "sk-web", "sk-batch", "sk-small"
KEYS = (
    ApiKey(name="web", sha256=hash_key(WEB)),
    ApiKey(name="nightly", sha256=hash_key(BATCH), priority="batch"),
    ApiKey(name="small", sha256=hash_key(SMALL), requests_per_minute=2, max_concurrent=1),
)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def client(backend: FakeBackend) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=make_app(backend, SETTINGS, KEYS))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic sk-web", "sk-web", "é"])
async def test_without_a_right_key_nobody_is_let_in(
    client: httpx.AsyncClient, backend: FakeBackend, header: str | None
):
    headers = {} if header is None else {"Authorization": header.encode()}
    answers = [
        await client.post(URL, json=BODY, headers=headers),
        await client.post("/v1/images/edits", content=b"x" * 9999, headers=headers),
        await client.get("/v1/models", headers=headers),
        await client.get("/v1/requests/x", headers=headers),
    ]

    assert [answer.status_code for answer in answers] == [401] * 4
    assert answers[0].json()["error"]["code"] == "invalid_api_key"
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert answers[0].headers["x-request-id"]
    assert backend.requests == []


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/openapi.json", "/v1/results/x?signature="]
)
async def test_some_doors_need_no_key(client: httpx.AsyncClient, path: str):
    assert (await client.get(path)).status_code in (200, 403)


async def test_requests_belong_to_their_key(client: httpx.AsyncClient, backend: FakeBackend):
    headers = bearer(WEB) | {"X-Request-ID": "webs"}
    made = await client.post(URL, json=BODY, headers=headers)
    own = await client.get("/v1/requests/webs", headers=bearer(WEB))
    others = await client.get("/v1/requests/webs", headers=bearer(BATCH))
    cancelled = await client.delete("/v1/requests/webs", headers=bearer(BATCH))

    assert made.status_code == 200
    assert backend.requests[0].owner == "web"
    assert (own.status_code, others.status_code, cancelled.status_code) == (200, 404, 404)


async def test_a_key_has_a_most_urgent_priority(client: httpx.AsyncClient, backend: FakeBackend):
    usual = await client.post(URL, json=BODY, headers=bearer(BATCH))
    urgent = await client.post(URL, json=BODY | {"priority": "normal"}, headers=bearer(BATCH))
    web = await client.post(URL, json=BODY | {"priority": "interactive"}, headers=bearer(WEB))

    assert (usual.status_code, urgent.status_code, web.status_code) == (200, 400, 200)
    assert urgent.json()["error"]["param"] == "priority"
    assert [r.priority for r in backend.requests] == [Priority.BATCH, Priority.INTERACTIVE]


async def test_a_key_sends_so_many_a_minute(client: httpx.AsyncClient):
    answers = [await client.post(URL, json=BODY, headers=bearer(SMALL)) for _ in range(3)]
    models = await client.get("/v1/models", headers=bearer(SMALL))

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert models.status_code == 200


async def test_a_key_has_so_many_at_once_however_they_end(
    client: httpx.AsyncClient, backend: FakeBackend
):
    backend.generate_with = blocking = Blocking()
    first = asyncio.create_task(client.post(URL, json=BODY, headers=bearer(SMALL)))
    while not blocking.began.is_set():
        await asyncio.sleep(0)
    second = await client.post(URL, json=BODY, headers=bearer(SMALL))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    wrong = await client.post(URL, json={}, headers=bearer(SMALL))

    assert second.status_code == 429
    assert "the limit is 1" in second.json()["error"]["message"]
    assert wrong.status_code == 400


async def test_cors_is_off_unless_wanted(backend: FakeBackend):
    headers = {"Origin": "https://app.example"}
    for origins, expected in (((), None), (("https://app.example",), "https://app.example")):
        settings = ApiSettings("emoji", cors_origins=origins)
        transport = httpx.ASGITransport(app=make_app(backend, settings, KEYS))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/healthz", headers=headers)
            asked = headers | {"Access-Control-Request-Method": "POST"}
            preflight = await client.options(URL, headers=asked)
        assert answer.headers.get("access-control-allow-origin") == expected
        assert preflight.headers.get("access-control-allow-origin") == expected


async def test_neither_prompts_nor_keys_reach_the_log(
    client: httpx.AsyncClient, backend: FakeBackend, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)

    async def fail(request: object) -> object:
        raise RuntimeError("boom")

    for generate in (backend.generate_with, fail):
        backend.generate_with = generate  # type: ignore[assignment]
        await client.post(URL, json={"prompt": "sekrit plans"}, headers=bearer(WEB))
        await client.post(URL, json={"prompt": "sekrit plans", "n": 99}, headers=bearer(WEB))

    assert "boom" in caplog.text
    assert "sekrit" not in caplog.text
    assert WEB not in caplog.text


def test_keys_are_written_and_read_back(tmp_path: Path):
    path = tmp_path / "keys.yaml"
    for key in KEYS:
        add_key(path, key)

    assert read_keys(path, None).keys == KEYS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert WEB not in path.read_text()
    with pytest.raises(KeysUnreadableError, match="'web'"):
        add_key(path, KEYS[0])


def test_keys_may_be_listed_plain_or_hashed():
    ring = read_keys(None, f"a=sk-1, b=sha256:{hash_key('sk-2')}")

    assert [ring.find(token) and ring.find(token).name for token in ("sk-1", "sk-2")] == ["a", "b"]  # type: ignore[union-attr]
    assert ring.find(hash_key("sk-2")) is None


@pytest.mark.parametrize(
    "listed", ["sk-plain-secret", "a=sha256:sk-plain-secret", "é=sk-plain-secret"]
)
def test_wrong_lists_are_refused_without_being_shown(listed: str):
    with pytest.raises(KeysUnreadableError) as caught:
        read_keys(None, listed)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["keys: [{name: a, sha256: sk-plain-secret}]", "keys: 3", "[", "keys: [{nme: a}]"]
)
def test_wrong_files_are_refused_without_being_shown(tmp_path: Path, text: str):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeysUnreadableError, match=r"keys\.yaml") as caught:
        read_keys(path, None)

    assert "secret" not in str(caught.value)


def test_every_key_is_compared():
    ring = KeyRing(KEYS)

    assert [ring.find(token) for token in (WEB, BATCH, SMALL, "")] == [*KEYS, None]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_leases_run_out_where_nobody_gives_them_back():
    clock = Clock()
    ledger = UsageLedger(clock, lease_s=60)
    key = ApiKey(name="k", sha256="0" * 64, max_concurrent=1)
    assert isinstance(ledger.take(key), Grant)
    assert isinstance(ledger.take(key), Refusal)
    clock.now_s = 61

    assert isinstance(ledger.take(key), Grant)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 20))
def test_no_minute_sees_more_than_twice_the_rate_and_waiting_as_told_helps(
    pauses_s: list[float], rate: int
):
    clock = Clock()
    ledger = UsageLedger(clock, lease_s=1)
    key = ApiKey(name="k", sha256="0" * 64, requests_per_minute=rate)
    granted_s: list[float] = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        answer = ledger.take(key)
        if isinstance(answer, Refusal):
            clock.now_s += answer.retry_after_s
            answer = ledger.take(key)
        assert isinstance(answer, Grant)
        granted_s.append(clock.now_s)

    # The bucket is a minute deep and is filled once a minute.
    for start_s in granted_s:
        assert sum(start_s <= moment_s < start_s + 60 for moment_s in granted_s) <= 2 * rate


@given(st.lists(st.booleans(), max_size=50), st.integers(1, 4))
def test_never_more_at_once_than_allowed(takes: list[bool], limit: int):
    ledger = UsageLedger(Clock(), lease_s=60)
    key = ApiKey(name="k", sha256="0" * 64, max_concurrent=limit)
    held: list[int] = []
    for take in takes:
        if take:
            answer = ledger.take(key)
            assert isinstance(answer, Grant) == (len(held) < limit)
            held += [answer.lease] if isinstance(answer, Grant) else []
        elif held:
            ledger.give_back("k", held.pop())
