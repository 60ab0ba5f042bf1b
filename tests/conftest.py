"""For all tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

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
