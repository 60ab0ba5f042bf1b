"""Where the service listens, and where it is then reached."""

from __future__ import annotations

import pytest
from stepserve.cli import app
from stepserve.config import HttpSettings, Settings
from stepserve.ray_serve.local.server import base_url
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9000"),
        ("0.0.0.0", "http://127.0.0.1:9000"),
        ("::1", "http://[::1]:9000"),
        ("::", "http://[::1]:9000"),
        ("gpu.example", "http://gpu.example:9000"),
    ],
)
def test_addresses_are_told_as_urls_have_them(host: str, url: str) -> None:
    assert base_url(Settings(http=HttpSettings(host=host, port=9000))) == url


@pytest.mark.parametrize("port", ["0", "70000", "-1"])
def test_ports_that_there_are_not_are_refused_before_anything_starts(port: str) -> None:
    ended = CliRunner().invoke(app, ["serve", "--port", port])
    assert ended.exit_code == 2
    assert "--port" in ended.output
