"""A real service on a real local Ray, for all tests that do not stop it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from running_service import Service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    aliases = {"STEPSERVE_MODELS__EMOJI__ALIASES": "dall-e-2,dall-e-3,gpt-image-1"}
    running = Service(tmp_path_factory.mktemp("service"), variables=aliases)
    running.start()
    yield running
    running.kill()


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as opened:
        yield opened
