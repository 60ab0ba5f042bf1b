"""For all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from running_clients import install_from_npm

# No deadlines: these tests are about what happens, and they also run on busy machines.
settings.register_profile(
    "busy machines", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machines")


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
