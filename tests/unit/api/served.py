"""Our HTTP server in a thread, and clients that write and read bytes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from stepserve.api.http.server import make_server
from stepserve.config import HttpSettings

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


@contextmanager
def served(app: FastAPI, limits: HttpSettings, max_connections: int = 100) -> Iterator[int]:
    """Our server in a thread, at a port that it yields; its socket listens before it runs."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = listener.getsockname()[1]
    server = make_server(app, limits, max_connections)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield port
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    while block := client.recv(65536):
        received += block
    return received


@dataclass(frozen=True)
class Answer:
    status: int
    head: bytes
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


def response_in(received: bytes) -> Answer:
    """The first answer in what was received; its body is all that follows."""
    head, _, body = received.partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]), head.lower(), body)


def read_response(client: socket.socket) -> Answer:
    """The next answer, of a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(client)
    response = response_in(received)
    length = next(v for n, v in _headers(response.head) if n == b"content-length")
    while len(response.body) < int(length):
        received += _more(client)
        response = response_in(received)
    return response


def _more(client: socket.socket) -> bytes:
    block = client.recv(65536)
    assert block, "the connection was closed before the response was whole"
    return block


def _headers(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = head.split(b"\r\n")[1:]
    return [(line.partition(b": ")[0], line.partition(b": ")[2]) for line in lines]


def is_closed(client: socket.socket, timeout_s: float = 10) -> bool:
    """Whether the server closes it in that time, without a word."""
    client.settimeout(timeout_s)
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False
