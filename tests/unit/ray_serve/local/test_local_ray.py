"""Which Ray a service uses, by the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from stepserve.ray_serve.local.local_ray import job_config, joined_address, set_defaults


@pytest.mark.parametrize("value", ["", "  ", "local", None])
def test_without_an_address_there_is_a_ray_of_our_own(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert joined_address() is None


def test_a_cluster_is_joined_that_an_address_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert joined_address() == "10.0.0.1:6379"


def test_defaults_take_the_place_of_what_is_empty() -> None:
    environ = {"EMPTY": "", "GIVEN": "2"}
    set_defaults({"EMPTY": "1", "GIVEN": "1", "MISSING": "1"}, environ)
    assert environ == {"EMPTY": "1", "GIVEN": "2", "MISSING": "1"}


def test_empty_variables_of_ray_are_as_if_they_were_not_set() -> None:
    """Ray would take them for numbers, and end with an error."""
    names = [
        "RAY_ADDRESS",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
        "RAY_AUTH_TOKEN",
        "RAY_TMPDIR",
    ]
    code = (
        "import os, stepserve.ray_serve.local.server\n"
        f"print([os.environ.get(name) for name in {names}])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | dict.fromkeys(names, ""),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[None, None, '1', None, None]"


def test_workers_get_no_folder_of_the_driver_to_import_from() -> None:
    config = job_config()
    assert config._client_job
    assert config._py_driver_sys_path == []


USED_AFTER_ITS_END = """
import ray
from stepserve.ray_serve.local.local_ray import never_start_unasked
never_start_unasked()
try:
    ray.put(1)
except Exception as error:
    print("refused:", error)
print(ray.is_initialized())
"""


def test_no_ray_is_started_by_whoever_uses_one_that_is_gone() -> None:
    command = [sys.executable, "-c", USED_AFTER_ITS_END]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("refused: ")
    assert ran.stdout.endswith("\nFalse\n")
