"""The service is not opened to other machines by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepserve.api.auth.keys import ApiKey, KeysUnreadableError, add_key
from stepserve.config import AuthSettings, HttpSettings, Settings
from stepserve.ray_serve.exposure import (
    OpenToAllError,
    check_exposure,
    is_loopback,
    needs_counter,
    read_access_keys,
)

ELSEWHERE = ["0.0.0.0", "::", "10.0.0.5", "192.168.1.2", "8.8.8.8", "myhost", "localhost.example"]
HERE = ["127.0.0.1", "127.0.0.2", "::1", "localhost"]


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.yaml"
    add_key(path, ApiKey(name="app", sha256="0" * 64))
    return str(path)


def settings_of(host: str, keys_file: str | None = None, **http: bool | int) -> Settings:
    return Settings(
        http=HttpSettings.model_validate({"host": host, **http}),
        auth=AuthSettings(keys_file=keys_file),
    )


@pytest.mark.parametrize("host", ELSEWHERE)
def test_other_machines_are_not_served_without_keys(host: str):
    with pytest.raises(OpenToAllError) as refused:
        check_exposure(settings_of(host))

    assert host in refused.value.message
    assert "stepserve keys create" in refused.value.message
    assert "--allow-anonymous" in refused.value.message


@pytest.mark.parametrize("host", ELSEWHERE)
def test_with_keys_or_on_purpose_they_are(host: str, keys_file: str):
    check_exposure(settings_of(host, keys_file))
    check_exposure(settings_of(host, allow_anonymous=True))


@pytest.mark.parametrize("host", HERE)
def test_this_machine_needs_no_keys(host: str):
    assert is_loopback(host)
    check_exposure(settings_of(host))


def test_an_empty_list_of_keys_lets_nobody_in(tmp_path: Path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("keys: []\n")
    with pytest.raises(OpenToAllError):
        check_exposure(settings_of("0.0.0.0", str(empty)))


def test_keys_that_cannot_be_read_stop_the_start(tmp_path: Path):
    with pytest.raises(KeysUnreadableError):
        check_exposure(settings_of("127.0.0.1", str(tmp_path / "missing.yaml"), allow_anonymous=1))


@pytest.mark.parametrize(
    ("replicas", "limits", "needed"),
    [(1, {"max_concurrent": 1}, False), (2, {}, False), (2, {"requests_per_minute": 5}, True)],
)
def test_use_is_counted_in_one_place_only_where_it_must_be(
    tmp_path: Path, replicas: int, limits: dict[str, int], needed: bool
):
    path = tmp_path / "keys.yaml"
    add_key(path, ApiKey.model_validate({"name": "app", "sha256": "0" * 64, **limits}))
    settings = settings_of("127.0.0.1", str(path), ingress_replicas=replicas)

    assert needs_counter(settings, read_access_keys(settings)) is needed
