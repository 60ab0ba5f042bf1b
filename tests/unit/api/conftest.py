from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from api_fakes import FakeBackend, client_for, make_app
from served import served
from stepserve.config import HttpSettings


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(backend) as client:
        yield client


@pytest.fixture
def server_port(backend: FakeBackend) -> Iterator[int]:
    """A real server with the limits that an operator would have it have."""
    with served(make_app(backend), HttpSettings()) as port:
        yield port
