from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn
from api_fakes import FakeBackend, client_for, make_app


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(backend) as client:
        yield client


@pytest.fixture
def server_port(backend: FakeBackend) -> Iterator[int]:
    """A real uvicorn server in a thread; its socket listens before the server runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = make_app(backend)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield port
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()
