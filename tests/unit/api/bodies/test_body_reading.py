"""What bodies may be: compressed, in UTF-8, not too slow, and not too many at a time."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from api_fakes import EMOJI, SETTINGS, FakeBackend, client_for, make_app
from stepserve.api.auth.keys import ApiKey, hash_key
from stepserve.api.bodies.reading import MAX_JSON_VALUES, SMALL_BYTES, Body, BodyBudget, BodyReader
from stepserve.api.errors import SlowRequestError, TooManyBodiesError
from stepserve.config import HttpSettings, Settings
from stepserve.domain.model_status import ModelStatus
from usual_tasks import USUAL_TASKS

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"prompt": "kät"}).encode()
LARGE = Settings(http=HttpSettings(max_upload_bytes=400_000))
KEY = "sk-stepserve-a-key-that-is-long-enough"


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


async def parts(data: bytes, size: int = 7) -> AsyncIterator[bytes]:
    for i in range(0, len(data), size):
        yield data[i : i + size]


async def post(client: httpx.AsyncClient, content: Any, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(GENERATIONS, content=content, headers=JSON | named)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("x-gzip", gzip.compress(BODY, mtime=0)),
        ("GZIP", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
)
async def test_compressed_bodies_are_read(
    client: httpx.AsyncClient, backend: FakeBackend, coding: str, body: bytes
):
    whole = await post(client, body, content_encoding=coding)
    in_chunks = await post(client, parts(body), content_encoding=coding)
    transferred = await post(client, parts(body), transfer_encoding=f"{coding}, chunked")

    statuses = [response.status_code for response in (whole, in_chunks, transferred)]
    assert statuses == [200, 200, 200]
    assert [request.prompt for request in backend.requests] == ["kät"] * 3


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, deflate"])
async def test_other_codings_are_refused_with_those_there_are(
    client: httpx.AsyncClient, coding: str
):
    response = await post(client, gzip.compress(BODY, mtime=0), content_encoding=coding)

    assert error_of(response) == (415, "unsupported_media_type")
    assert response.headers["accept-encoding"] == "gzip, deflate"
    assert "must be gzip or deflate" in response.json()["error"]["message"]


async def test_what_unfolds_over_the_limit_is_refused(client: httpx.AsyncClient):
    response = await post(client, gzip.compress(b" " * 10**5), content_encoding="gzip")

    assert error_of(response) == (413, "body_too_large")
    assert (
        f"decompresses to {SETTINGS.http.max_body_bytes} bytes"
        in response.json()["error"]["message"]
    )


async def test_what_unfolds_too_far_is_refused(backend: FakeBackend):
    bomb = gzip.compress(b" " * LARGE.http.max_upload_bytes)
    headers = JSON | {"Content-Encoding": "gzip"}
    async with client_for(backend, LARGE) as client:
        response = await client.post(EDITS, content=bomb, headers=headers)

    assert error_of(response) == (413, "body_too_large")
    assert "over 100 times" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"no gzip",
        gzip.compress(BODY, mtime=0)[:-4],
        gzip.compress(BODY, mtime=0) + b"more",
        gzip.compress(BODY, mtime=0) + gzip.compress(BODY, mtime=0),
        b"\x1f",
    ],
)
async def test_what_is_not_compressed_as_it_says_is_told_so(client: httpx.AsyncClient, body: bytes):
    response = await post(client, body, content_encoding="gzip")

    assert error_of(response) == (400, "invalid_body")
    assert "gzip" in response.json()["error"]["message"]


CHARSETS = [
    "charset=punycode",
    'charset="punycode"',
    "Charset=PUNYCODE",
    "charset = punycode",
    "charset=utf-8; charset=punycode",
    "charset=idna",
    "charset=utf-16",
    "charset=zlib",
    "charset=iso-8859-1",
]


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
async def test_no_charset_but_utf_8(client: httpx.AsyncClient, kind: str, charset: str):
    response = await client.post(
        EDITS, content=b"x", headers={"Content-Type": f"{kind}; {charset}"}
    )

    assert error_of(response) == (400, "unsupported_charset")
    assert "must be 'utf-8'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "charset", ["utf-8", "UTF-8", '"utf-8"', "utf8", "utf-8; charset*=utf-8''punycode"]
)
async def test_utf_8_may_be_said(client: httpx.AsyncClient, backend: FakeBackend, charset: str):
    kind = f"application/json; charset={charset}"
    response = await client.post(GENERATIONS, content=BODY, headers={"Content-Type": kind})

    assert response.status_code == 200
    assert backend.requests[0].prompt == "kät"


def form(part: bytes, text: bytes, headers: bytes = b"") -> bytes:
    disposition = b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n"
    return disposition + headers + b"\r\n" + text + b"\r\n--x--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    "body",
    [
        form(b'name="prompt"', b"\xe9"),
        form(b'name="\xe9"', b"a"),
        form(b'name="image"; filename="\xe9"', b"a"),
    ],
)
async def test_texts_of_forms_that_are_not_utf_8_are_refused(
    client: httpx.AsyncClient, body: bytes
):
    response = await client.post(EDITS, content=body, headers=FORM)

    assert error_of(response) == (400, "invalid_form")
    assert "UTF-8" in response.json()["error"]["message"]


async def test_forms_have_limits_of_their_own(backend: FakeBackend):
    many = b"".join(form(b'name="k%d"' % i, b"")[:-7] for i in range(101)) + b"--x--\r\n"
    long_name = form(b'name="a"' + b";" * 2000, b"")
    async with client_for(backend, LARGE) as client:
        fields = await client.post(EDITS, content=many, headers=FORM)
        name = await client.post(EDITS, content=long_name, headers=FORM)

    assert error_of(fields) == error_of(name) == (400, "invalid_form")
    assert "Maximum number of fields is 100" in fields.json()["error"]["message"]
    assert "the limit is 1024 bytes" in name.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Type: text/plain; charset=punycode\r\n",
        b"Content-Transfer-Encoding: base64\r\n",
        b"Content-Type: text/plain; charset=utf-16\r\n",
    ],
)
async def test_parts_of_forms_choose_no_codec(client: httpx.AsyncClient, headers: bytes):
    """The text is taken as it is: what is missing is only the image."""
    charset = form(b'name="_charset_"', b"punycode").replace(b"--x--\r\n", b"")
    body = charset + form(b'name="prompt"', "kät-".encode(), headers)
    response = await client.post(EDITS, content=body, headers=FORM)

    assert error_of(response) == (400, "invalid_value")


@pytest.mark.parametrize("codec", ["utf-16", "utf-32", "utf-16-le", "utf-32-be"])
async def test_json_in_other_encodings_is_refused(client: httpx.AsyncClient, codec: str):
    text = BODY.decode().encode(codec)
    responses = [await client.post(url, content=text, headers=JSON) for url in (GENERATIONS, EDITS)]

    assert [error_of(response) for response in responses] == [(400, "invalid_json")] * 2


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 60_000,
        b'{"seed": ' + b"9" * 300_000 + b"}",
        b"[" + b"{}," * MAX_JSON_VALUES + b"{}]",
    ],
)
@pytest.mark.parametrize("url", [GENERATIONS, EDITS])
async def test_json_that_would_take_long_is_refused(backend: FakeBackend, url: str, body: bytes):
    async with client_for(backend, LARGE) as client:
        response = await client.post(url, content=body, headers=JSON)

    assert error_of(response) == (400, "invalid_json")


async def test_a_long_body_arrives_whole(backend: FakeBackend):
    backend.statuses = [ModelStatus(replace(EMOJI, tasks=USUAL_TASKS), ready=True)]
    body = json.dumps({"prompt": "x", "image": "data:image/png;base64," + "A" * 300_001}).encode()
    async with client_for(backend, LARGE) as client:
        responses = await asyncio.gather(
            *(client.post(EDITS, content=body, headers=JSON) for _ in range(5))
        )

    assert [response.json()["error"]["param"] for response in responses] == ["image"] * 5


class Endless:
    """Sends `first`, and nothing after it until it is told to."""

    def __init__(self, first: int) -> None:
        self.goes_on = asyncio.Event()
        self.asked = asyncio.Event()
        self._messages = [{"type": "http.request", "body": b" " * first, "more_body": True}]

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        self.asked.set()
        await self.goes_on.wait()
        return {"type": "http.request", "body": b"", "more_body": False}


async def test_a_body_that_does_not_arrive_is_given_up():
    with pytest.raises(SlowRequestError, match=r"within 0\.01 s"):
        await BodyReader(0.01, BodyBudget(10**6)).read(Endless(5).receive, None, Body(100))


async def test_a_slow_body_is_answered(backend: FakeBackend):
    settings = Settings(http=HttpSettings(body_timeout_s=0.01))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": []}
    await make_app(backend, settings)(
        scope | {"query_string": b"", "root_path": ""}, Endless(5).receive, send
    )

    assert sent[0]["status"] == 408


async def test_the_body_that_is_awaited_longest_gives_way():
    reader = BodyReader(60, BodyBudget(250_000))
    first, second, small, third = Endless(150_000), Endless(150_000), Endless(9), Endless(200_000)
    reading, bodies = [], []
    for sender in (first, small, second, third):
        bodies.append(Body(10**6))
        read = reader.read(sender.receive, None, bodies[-1])
        reading.append(asyncio.create_task(read))
        await sender.asked.wait()
    with pytest.raises(TooManyBodiesError):
        await reading[0]
    for sender in (small, second, third):
        sender.goes_on.set()
    await asyncio.gather(*reading[1:])

    assert [body.size_bytes for body in bodies[1:]] == [9, 150_000, 200_000]


async def test_a_body_that_gave_way_counts_no_more():
    """It goes on for a moment, with what it has received."""
    budget = BodyBudget(100_000)
    timeouts = [asyncio.Timeout(None) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for timeout in timeouts:
            await stack.enter_async_context(timeout)
        first, second, third = [stack.enter_context(budget.hold(t)) for t in timeouts]
        first.grow(SMALL_BYTES + 90_000)
        second.grow(SMALL_BYTES + 50_000)
        first.grow(SMALL_BYTES + 95_000)
        third.grow(SMALL_BYTES + 40_000)

        told = [held.gave_way for held in (first, second, third)]
        timeouts[0].reschedule(None)

    assert told == [True, False, False]


async def test_half_a_body_holds_no_place_of_a_key(backend: FakeBackend):
    key = ApiKey(name="shop", sha256=hash_key(KEY), max_concurrent=1)
    app = make_app(backend, keys=[key])
    held = Endless(5)
    headers = [(b"authorization", f"Bearer {KEY}".encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": headers}

    async def send(message: Any) -> None:
        pass

    waiting = asyncio.create_task(
        app(scope | {"query_string": b"", "root_path": ""}, held.receive, send)
    )
    await held.asked.wait()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await post(client, BODY, authorization=f"Bearer {KEY}")
    held.goes_on.set()
    await waiting

    assert response.status_code == 200


async def test_long_heads_are_refused_by_the_app_too(backend: FakeBackend):
    """Behind Ray Serve's proxies there is no connection of ours."""
    http = HttpSettings(max_url_bytes=50, max_header_bytes=500, max_headers=10)
    async with client_for(backend, Settings(http=http)) as client:
        url = await client.get("/healthz", params={"a": "b" * 50})
        size = await client.get("/healthz", headers={"X-A": "b" * 500})
        count = await client.get("/healthz", headers={f"X-{i}": "b" for i in range(10)})
        good = await client.get("/healthz")

    assert error_of(url) == (414, "url_too_long")
    assert error_of(size) == error_of(count) == (431, "headers_too_large")
    assert good.status_code == 200
