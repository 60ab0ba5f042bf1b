"""However bytes are cut into pieces on their way, the responses are the same."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise
from typing import Any, cast

import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from stepserve.api.http.open_connections import OpenConnections
from stepserve.api.http.protocol import LimitedHttpProtocol
from stepserve.api.http.refusals import Refusals
from stepserve.config import HttpSettings
from uvicorn.server import ServerState

LIMITS = HttpSettings(max_url_bytes=40, max_header_bytes=200, max_headers=8)

GET = b"GET /got HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /sent HTTP/1.1\r\nContent-Length: 11\r\n\r\nhello world"
CHUNKED = (
    b"POST /chunked HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nX-Trailer: no\r\n\r\n"
)
UPGRADE = POST.replace(b"/sent", b"/kept").replace(
    b"\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n", 1
)
GOOD = {
    GET: b"GET /got 0",
    POST: b"POST /sent 11",
    CHUNKED: b"POST /chunked 11",
    UPGRADE: b"POST /kept 11",
}
BAD = {
    b"GET /" + b"a" * 60 + b" HTTP/1.1\r\n\r\n": b"414",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 300 + b"\r\n\r\n": b"431",
    b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 9 + b"\r\n": b"431",
    b"no HTTP at all\r\n\r\n": b"400",
    UPGRADE.replace(b"h2c", b"h2c" + b"\r\nX: a" * 9): b"431",
}


class Wire:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = write_eof = close

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_extra_info(self, name: str) -> None:
        return None


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with method, path and length of the body; takes its time."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
        await asyncio.sleep(0)
    assert not [name for name, _ in scope["headers"] if name == b"x-trailer"]
    told = f"{scope['method']} {scope['path']} {size}".encode()
    headers = [(b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        raise ValueError("a response may be sent while an error is handled")
    except ValueError:
        await send({"type": "http.response.body", "body": told})


async def responses_to(pieces: list[bytes]) -> bytes:
    wire = Wire()
    make = partial(LimitedHttpProtocol, LIMITS, OpenConnections(9), Refusals())
    config = uvicorn.Config(echo, http=cast(type, make), ws="none", log_config=None)
    config.load()
    protocol = make(config=config, server_state=ServerState(), app_state={}, _loop=None)
    protocol.connection_made(cast(asyncio.Transport, wire))
    for piece in pieces:
        while wire.paused and not wire.closed:
            await asyncio.sleep(0)
        protocol.data_received(piece)
    for _ in range(200):
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    return wire.written


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % len(data) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(GOOD)), min_size=1, max_size=6),
    st.sampled_from([b"", *sorted(BAD)]),
    st.lists(st.integers(0, 2000), max_size=30),
)
def test_answers_do_not_depend_on_pieces(good: list[bytes], bad: bytes, places: list[int]):
    written = asyncio.run(responses_to(cut(b"".join(good) + bad, places)))

    begun = [f"HTTP/1.1 {status}".encode() for status in (200, 400, 414, 431)]
    assert sum(map(written.count, begun)) == len(good) + bool(bad)
    for request in good:
        assert written.count(GOOD[request]) == good.count(request)
    if bad:
        assert written.rpartition(b"HTTP/1.1 ")[2].startswith(BAD[bad])
