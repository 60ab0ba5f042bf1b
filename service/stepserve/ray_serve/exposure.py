"""Who may call the service, and whether it is open to more than are meant."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from stepserve.api.auth.keys import KeyRing, read_keys
from stepserve.config import Settings
from stepserve.domain.errors import StepserveError


class OpenToAllError(StepserveError):
    """Other machines could use the service without an API key, and nobody said they may."""


def check_exposure(settings: Settings) -> None:
    """Return if whoever can reach the service is meant to.

    Raises:
        OpenToAllError: other machines could use it without an API key, and nobody said they may.
        KeysUnreadableError: the API keys are not written as they should be.
    """
    host = settings.http.host
    if read_access_keys(settings).keys or settings.http.allow_anonymous or is_loopback(host):
        return
    raise OpenToAllError(
        f"anybody who reaches {host} could use this service, as it has no API keys. Make one:\n"
        "  stepserve keys create my-app --file keys.yaml\n"
        "  STEPSERVE_AUTH__KEYS_FILE=keys.yaml stepserve serve ...\n"
        "or serve without: --allow-anonymous (http.allow_anonymous: true)"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def needs_counter(settings: Settings, keys: KeyRing) -> bool:
    """Whether the use of keys must be counted in one place outside the ingress replicas."""
    return settings.http.ingress_replicas > 1 and any(key.has_limits for key in keys.keys)


def read_access_keys(settings: Settings) -> KeyRing:
    """The API keys that the settings name.

    Raises:
        KeysUnreadableError: they are not written as they should be.
    """
    path = settings.auth.keys_file
    return read_keys(None if path is None else Path(path), settings.auth.keys)
