"""A real service on a real local Ray, for all tests that do not stop it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_service import Service

# Whoever imports one of these leaves a mark, and then fails as nobody would want to.
HOSTILE = (
    *("aiohttp", "grpc", "json", "multiprocessing", "numpy", "psutil", "ray", "stepserve"),
    *("setproctitle", "sitecustomize", "torch", "typer", "usercustomize", "yaml"),
)
# What other clusters of Ray want.
HOSTILE_VARIABLES = {
    "RAY_ADDRESS": "",
    "RAY_AUTH_MODE": "disabled",
    "RAY_AUTH_TOKEN": "x" * 32,
}


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which much can be imported that should not be."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in HOSTILE:
        (folder / name).mkdir()
        code = f"open({str(folder / 'mark')!r}, 'a').write({name!r} + chr(10))\nraise SystemExit(9)"
        (folder / name / "__init__.py").write_text(code)
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, hostile: Path) -> Iterator[Service]:
    """Started by somebody who stands in a hostile folder."""
    variables = HOSTILE_VARIABLES | {
        "STEPSERVE_MODELS__EMOJI__ALIASES": "dall-e-2,dall-e-3,gpt-image-1",
        # What happened is counted on `/metrics` a second later, not five.
        "RAY_metrics_report_interval_ms": "1000",
    }
    running = Service(
        tmp_path_factory.mktemp("service"),
        variables=variables,
        engine={"max_pending_images": 24},
        working_folder=hostile,
    )
    running.start()
    yield running
    running.stop()


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as opened:
        yield opened
