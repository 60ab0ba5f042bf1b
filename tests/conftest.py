"""For all tests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from running_clients import install_from_npm
from virtual_time import VirtualTimeLoop

# No deadlines: these tests are about what happens, and they also run on busy machines.
settings.register_profile(
    "busy machines", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machines")

# What is imported stays: looking through two million objects for garbage, again and again, took a
# third of the collection's time, and a second of each test that collects garbage.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], Any]]:
    is_virtual = item.get_closest_marker("virtual_time") is not None
    return {"loop": VirtualTimeLoop if is_virtual else asyncio.new_event_loop}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print although tests are quiet: what was measured belongs into the log."""

    def write(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end=" ")

    return write


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny kernels: a second thread only costs, above all on a busy machine."""
    # Most tests need no torch, which takes seconds to import.
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the clients of npm are installed."""
    return install_from_npm(tmp_path_factory.mktemp("javascript"))
