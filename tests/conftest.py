"""For all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadlines: these tests are about what happens, and they also run on busy machines.
settings.register_profile(
    "busy machines", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machines")
