"""Settings that are read again while the service runs."""

from __future__ import annotations

from service.config import ModelSettings, Settings
from service.deployments.server import _reload


def test_whatever_is_wrong_with_new_settings_changes_nothing() -> None:
    """Ray has bounds of its own, and says so with errors of its own choice."""
    before, told = Settings(), []
    finer_than_ray_knows = Settings(models={"emoji": ModelSettings(num_cpus=0.00001)})
    assert _reload(before, lambda: finer_than_ray_knows, told.append) is before
    assert len(told) == 1
    assert told[0].startswith("nothing is changed: The precision of")
