"""Settings that are read again while the service runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from stepserve.config import ConfigError, ModelSettings, Settings
from stepserve.ray_serve.local.server import MOST_LOOKS, _reload, _settled, _what_changed

HALF = Settings(models={"a": ModelSettings()})
WHOLE = Settings(models={"a": ModelSettings(), "b": ModelSettings()})


def ignore(seconds: float) -> None:
    """Nobody sleeps here."""


def reader(looks: Sequence[Settings | ConfigError]) -> Callable[[], Settings]:
    """What a file holds at each look, and for ever after the last."""
    left = list(looks)

    def read() -> Settings:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, ConfigError):
            raise found
        return found

    return read


def test_whatever_is_wrong_with_new_settings_changes_nothing() -> None:
    """Ray has bounds of its own, and says so with errors of its own choice."""
    before = Settings()
    told: list[str] = []
    finer_than_ray_knows = Settings(models={"emoji": ModelSettings(num_cpus=0.00001)})
    assert _reload(before, lambda: finer_than_ray_knows, told.append, ignore) is before
    assert len(told) == 1
    assert told[0].startswith("nothing is changed: The precision of")


@pytest.mark.parametrize(
    "looks",
    [
        [WHOLE],
        [HALF, WHOLE],
        [ConfigError("holds no settings"), HALF, WHOLE],
        [HALF, ConfigError("not valid YAML"), WHOLE],
    ],
)
def test_a_file_that_is_being_written_is_read_when_it_is_whole(
    looks: Sequence[Settings | ConfigError],
) -> None:
    assert _settled(reader(looks), ignore) == WHOLE


def test_a_file_that_stays_wrong_is_told() -> None:
    pauses_s: list[float] = []
    with pytest.raises(ConfigError, match="holds no settings"):
        _settled(reader([ConfigError("holds no settings")]), pauses_s.append)
    assert len(pauses_s) == MOST_LOOKS - 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (WHOLE, WHOLE, ["nothing has changed since the settings were last read"]),
        (
            WHOLE,
            Settings(models=WHOLE.models, default_model="b"),
            ["not applied before a restart: default_model"],
        ),
        (
            Settings(models=WHOLE.models, default_model="b"),
            HALF,
            [
                "not applied before a restart: default_model",
                "requests that name no model are refused before a restart: b is removed, which "
                "they were for",
            ],
        ),
    ],
)
def test_what_a_reload_does_not_do_is_told(old: Settings, new: Settings, told: list[str]) -> None:
    assert _what_changed({}, old, new) == told


def test_what_a_reload_does_is_told() -> None:
    done = {"added": ["b"], "updated": [], "removed": []}
    assert _what_changed(done, HALF, WHOLE) == ["added: b"]
