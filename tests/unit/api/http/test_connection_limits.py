"""What one client may do to a connection, on real sockets."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest
from api_fakes import Blocking, FakeBackend, finish, make_app
from served import HEALTH, connect, is_closed, read_all, read_response, response_in, served
from stepserve.api.exchange_context import Exchange
from stepserve.api.http.server import make_server
from stepserve.api.observe.exchanges import Observation
from stepserve.config import HttpSettings
from stepserve.domain.events import Accepted, Event, Outcome
from stepserve.domain.requests import GenerationRequest
from uvicorn.server import ServerState
from virtual_time import until

LIMITS = HttpSettings(
    max_url_bytes=1000,
    max_header_bytes=4000,
    max_headers=20,
    header_timeout_s=0.3,
    send_timeout_s=0.5,
    keep_alive_s=0.4,
)
MOST = 20
GENERATIONS = (
    b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
)
MEGABYTE = b"a" * 2**20


@pytest.fixture
def port(backend: FakeBackend) -> Iterator[int]:
    with served(make_app(backend), LIMITS, MOST) as port:
        yield port


def refused(port: int, *parts: bytes) -> tuple[int, str, str]:
    """Status, code and message of the response to these bytes, after which the connection ends."""
    with connect(port) as client:
        try:
            for part in parts:
                client.sendall(part)
        except ConnectionError:
            pass
        response = response_in(read_all(client))
    assert b"connection: close" in response.head
    assert b"x-request-id: " in response.head
    assert b"content-type: application/json" in response.head
    return response.status, response.error["code"], response.error["message"]


def is_well(port: int) -> bool:
    with connect(port) as client:
        client.sendall(HEALTH)
        return read_response(client).status == 200


@pytest.mark.parametrize("megabytes", [0.001, 3])
def test_a_long_url_is_refused_before_it_ends(port: int, megabytes: float):
    url = MEGABYTE[: int(megabytes * 2**20)] * max(1, int(megabytes))
    status, code, message = refused(port, b"GET /", url)

    assert (status, code) == (414, "url_too_long")
    assert "the limit is 1000 bytes" in message
    assert is_well(port)


def test_a_query_counts_in_the_url(port: int):
    query = b"&".join(b"a=1" for _ in range(300))

    assert refused(port, b"GET /healthz?" + query + b" HTTP/1.1\r\n")[0] == 414


def test_an_endless_header_is_refused_before_it_ends(port: int):
    status, code, message = refused(port, HEALTH[:-2] + b"X-A: ", *[MEGABYTE] * 3)

    assert (status, code) == (431, "headers_too_large")
    assert "the limit is 4000 bytes" in message


def test_headers_of_too_many_bytes_are_refused(port: int):
    lines = b"".join(b"x-%d: %s\r\n" % (i, b"b" * 500) for i in range(10))

    assert refused(port, HEALTH[:-2] + lines + b"\r\n")[:2] == (431, "headers_too_large")


def test_too_many_headers_are_refused(port: int):
    lines = b"".join(b"x-%d: a\r\n" % i for i in range(20))
    status, code, message = refused(port, HEALTH[:-2] + lines + b"\r\n")

    assert (status, code) == (431, "headers_too_large")
    assert "the limit is 20" in message


def test_headers_at_the_limit_pass(port: int):
    lines = b"".join(b"x-%d: %s\r\n" % (i, b"b" * 190) for i in range(19))
    with connect(port) as client:
        client.sendall(HEALTH[:-2] + lines + b"\r\n")

        assert read_response(client).status == 200


def test_empty_lines_before_a_request_end(port: int):
    assert refused(port, b"\r\n" * 2**20)[:2] == (431, "headers_too_large")


@pytest.mark.parametrize(
    "garbage",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/0.9\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/2.0\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"GET /a b c HTTP/1.1\r\n\r\n",
        GENERATIONS + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        GENERATIONS + b"Content-Length: 99999999999999999999999\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(port: int, garbage: bytes):
    assert refused(port, garbage)[:2] == (400, "invalid_http")


def test_the_http_before_it_is_answered(port: int):
    with connect(port) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")

        assert read_response(client).status == 200


def test_a_tunnel_is_refused(port: int):
    assert refused(port, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n")[0] == 405


def test_a_broken_chunk_ends_the_request(port: int, backend: FakeBackend):
    chunked = GENERATIONS + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"

    assert refused(port, chunked)[:2] == (400, "invalid_http")
    assert backend.requests == []


@pytest.mark.parametrize("rest", [b"1;x=", b"0\r\nX-Trailer: "])
def test_what_is_around_chunks_is_limited(port: int, rest: bytes):
    chunked = GENERATIONS + b"Transfer-Encoding: chunked\r\n\r\n"

    assert refused(port, chunked + rest, *[MEGABYTE] * 2)[:2] == (431, "headers_too_large")


def test_trailers_are_no_headers(port: int, backend: FakeBackend):
    body = b'{"prompt": "cat"}'
    chunk = b"%x\r\n%s\r\n0\r\nX-Request-ID: from-a-trailer\r\n\r\n" % (len(body), body)
    with connect(port) as client:
        client.sendall(GENERATIONS + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
        response = read_response(client)

    assert response.status == 200
    assert backend.requests[0].prompt == "cat"
    assert backend.requests[0].id != "from-a-trailer"


def test_headers_that_do_not_arrive_are_answered_in_time(port: int):
    status, code, message = refused(port, HEALTH[:-2])

    assert (status, code) == (408, "request_timeout")
    assert "0.3 s" in message


def test_a_silent_connection_is_closed_without_a_word(port: int):
    with connect(port) as client:
        assert is_closed(client)


@pytest.mark.parametrize("begun", [b"", HEALTH[:10]])
def test_a_connection_that_was_kept_alive_ends_as_well(port: int, begun: bytes):
    with connect(port) as client:
        client.sendall(HEALTH)
        assert read_response(client).status == 200
        client.sendall(begun)
        received = read_all(client)

    assert (response_in(received).status == 408) if begun else (received == b"")


def test_what_is_refused_is_told_like_any_other_answer(backend: FakeBackend):
    told: list[Exchange] = []
    app = make_app(backend)
    app.state.observation = Observation(listeners=(told.append,))
    with served(app, LIMITS) as port:
        refused(port, b"GET /", MEGABYTE)

    (exchange,) = told
    assert (exchange.route, exchange.status, exchange.outcome) == ("unmatched", 414, "url_too_long")
    assert not exchange.asks_for_work


@pytest.mark.virtual_time
async def test_one_that_works_is_not_cut_off(backend: FakeBackend):
    backend.generate_with(blocking := Blocking())
    server_end, client_end = socket.socketpair()
    config = make_server(make_app(backend), LIMITS, MOST).config
    config.load()
    of_server = {"config": config, "server_state": ServerState(), "app_state": {}}
    protocol = partial(config.http_protocol_class, **of_server)
    await asyncio.get_running_loop().connect_accepted_socket(protocol, server_end)
    reader, writer = await asyncio.open_connection(sock=client_end)
    writer.write(GENERATIONS + b'Content-Length: 17\r\n\r\n{"prompt": "cat"}')
    await until(lambda: backend.requests)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 3 * LIMITS.header_timeout_s)
    writer.close()
    await writer.wait_closed()
    await until(blocking.cancelled.is_set)


def test_the_longest_silent_connection_gives_way_to_a_new_one(backend: FakeBackend):
    patient = HttpSettings(header_timeout_s=60)
    with served(make_app(backend), patient, max_connections=3) as port:
        first, half = connect(port), connect(port)
        half.sendall(HEALTH[:20])
        others = [connect(port) for _ in range(2)]
        assert is_closed(first)
        assert is_well(port)
        received = read_all(half)
        for client in (first, half, *others):
            client.close()

    assert response_in(received).status == 503
    assert response_in(received).error["code"] == "too_many_connections"
    assert b"retry-after: 1" in response_in(received).head


def test_those_at_work_do_not_give_way(backend: FakeBackend):
    blocking = Blocking()
    backend.generate_with(blocking)
    with served(make_app(backend), HttpSettings(), max_connections=1) as port:
        with connect(port) as client:
            client.sendall(GENERATIONS + b'Content-Length: 17\r\n\r\n{"prompt": "cat"}')
            assert blocking.began.wait(10)

            assert refused(port, HEALTH)[:2] == (503, "too_many_connections")
            assert not blocking.cancelled.is_set()
        assert blocking.cancelled.wait(10)


def test_many_requests_at_once_are_answered_in_order(port: int):
    count = 2000
    with connect(port) as client:
        sent = b"".join(HEALTH.replace(b"healthz", b"no-%04d" % i) for i in range(count))
        client.sendall(sent + HEALTH.replace(b"Host: a", b"Connection: close"))
        received = read_all(client)

    places = [received.find(b"no-%04d" % i) for i in range(count)]
    assert -1 not in places
    assert places == sorted(places)
    assert received.count(b"HTTP/1.1 200") == 1


def test_a_connection_that_waits_holds_nothing_of_the_request_before(backend: FakeBackend):
    patient = LIMITS.model_copy(update={"keep_alive_s": 60.0, "header_timeout_s": 60.0})
    with served(make_app(backend), patient, MOST) as port, connect(port) as client:
        client.sendall(GENERATIONS + b'Content-Length: 15\r\n\r\n{"prompt": "x"}')
        assert read_response(client).status == 200
        request = weakref.ref(backend.requests.pop())
        # By then the server has done all that it does after a response.
        assert is_well(port)
        gc.collect()
        assert request() is None
        client.sendall(HEALTH)
        assert read_response(client).status == 200


def test_what_is_wrong_behind_a_good_request_is_answered_after_it(port: int):
    with connect(port) as client:
        client.sendall(HEALTH + b"garbage\r\n\r\n")
        received = read_all(client)

    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1 400") == 1


def test_an_answer_before_the_body_is_not_lost(port: int):
    """The client sends on: closing at once would make its kernel drop the response."""
    with connect(port) as client:
        client.sendall(GENERATIONS + b"Content-Length: 90000000\r\n\r\n")
        for _ in range(20):
            client.sendall(MEGABYTE)
        response = response_in(read_all(client))

    assert response.status == 413
    assert b"connection: close" in response.head


def test_a_client_that_never_reads_is_cut_off(port: int):
    asks = HEALTH.replace(b"healthz", b"openapi.json") * 10
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", port))

        with pytest.raises(ConnectionError):
            send_for_ever(client, asks)


def send_for_ever(client: socket.socket, data: bytes) -> None:
    while True:
        client.sendall(data)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_an_upgrade_is_ignored_and_the_body_is_read(
    port: int, backend: FakeBackend, protocol: bytes
):
    """Java's client asks for HTTP/2 so with every request to an `http:` address."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\n"
    with connect(port) as client:
        for word in (b"cat", b"dog"):
            body = b'{"prompt": "%s"}' % word
            client.sendall(GENERATIONS + upgrade + b"HTTP2-Settings: AA\r\n")
            client.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert read_response(client).status == 200

    assert [request.prompt for request in backend.requests] == ["cat", "dog"]


def test_a_half_closed_connection_is_answered(port: int, backend: FakeBackend):
    with connect(port) as client:
        client.sendall(GENERATIONS + b'Content-Length: 17\r\n\r\n{"prompt": "cat"}')
        client.shutdown(socket.SHUT_WR)
        response = response_in(read_all(client))

    assert response.status == 200
    assert b'"b64_json"' in response.body


def test_a_half_closed_stream_goes_on(port: int):
    body = b'{"prompt": "cat", "stream": true}'
    with connect(port) as client:
        client.sendall(GENERATIONS + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        client.shutdown(socket.SHUT_WR)
        response = response_in(read_all(client))

    assert response.status == 200
    assert b"event: image_generation.completed" in response.body


def test_a_half_closed_connection_is_answered_in_the_end(port: int, backend: FakeBackend):
    """After the server has tried whether the client is there, which it does not see."""
    responses = threading.Event()

    async def slow(request: GenerationRequest) -> Outcome:
        await asyncio.to_thread(responses.wait, 10)
        return await finish(request)

    backend.generate_with(slow)
    with connect(port) as client:
        client.sendall(GENERATIONS + b'Content-Length: 17\r\n\r\n{"prompt": "cat"}')
        client.shutdown(socket.SHUT_WR)
        begun = client.recv(9)
        while len(begun) < 2:
            begun += client.recv(9)
        responses.set()
        response = response_in(begun + read_all(client))

    assert (begun, response.status) == (b"HT", 200)
    assert b'"b64_json"' in response.body


@pytest.mark.parametrize("first", [b"", HEALTH])
def test_a_client_that_leaves_after_half_closing_is_gone(
    port: int, backend: FakeBackend, first: bytes
):
    blocking = Blocking()
    backend.generate_with(blocking)
    with connect(port) as client:
        client.sendall(first + GENERATIONS + b'Content-Length: 17\r\n\r\n{"prompt": "cat"}')
        client.shutdown(socket.SHUT_WR)
        assert blocking.began.wait(10)
        if first:
            assert read_response(client).status == 200
        # The server has tried whether the client is there.
        assert client.recv(1)
        assert not blocking.cancelled.is_set()

    assert blocking.cancelled.wait(10)


def test_a_client_that_leaves_a_silent_stream_is_gone(port: int, backend: FakeBackend):
    gone = threading.Event()

    async def silent(request: GenerationRequest) -> AsyncIterator[Event]:
        try:
            yield Accepted(request.id, 0, 0.5)
            await asyncio.Event().wait()
        finally:
            gone.set()

    backend.stream_with = silent
    body = b'{"prompt": "cat", "stream": true}'
    with connect(port) as client:
        client.sendall(GENERATIONS + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        client.recv(100)
        assert not gone.is_set()

    assert gone.wait(8)


def test_a_half_request_of_a_half_closed_connection_is_none(port: int):
    with connect(port) as client:
        client.sendall(GENERATIONS + b'Content-Length: 17\r\n\r\n{"prompt"')
        client.shutdown(socket.SHUT_WR)

        assert read_all(client) == b""
