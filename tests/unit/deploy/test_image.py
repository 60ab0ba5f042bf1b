"""The image and the compose stack refer to what exists."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from monitoring_files import ROOT
from stepserve.config import load_settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source.removeprefix('./')}" in ignored


def test_it_runs_as_a_number():
    """Kubernetes cannot tell that a name is not root's."""
    assert re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[1] == "10001"
    assert "HEALTHCHECK" in DOCKERFILE


def test_ray_wants_a_token_and_imports_nothing_that_others_can_write():
    """A cluster made of the image does not start without one; a lone service makes its own."""
    service = DOCKERFILE[DOCKERFILE.index(" AS service") :]
    assert "RAY_AUTH_MODE=token" in service
    assert "PYTHONSAFEPATH=1" in service
    # Ray's workers import from the folder that they are started in.
    assert re.search(r"^WORKDIR (\S+)$", service, re.MULTILINE)[1] == "/srv"
    assert not re.search(r"chown.* /srv", service)


def test_stages_that_are_built_exist_and_the_service_is_what_is_built_by_default():
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    wanted = {s["build"]["target"] for s in COMPOSE["services"].values() if "build" in s}
    assert wanted == {"service", "locust"} <= set(stages)
    assert stages[-1] == "service"


def test_settings_of_the_stack_are_understood():
    for service in ("stepserve", "stepserve-gpu"):
        variables = COMPOSE["services"][service]["environment"]
        assert load_settings(None, variables).http.allow_anonymous


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_are_contained_and_their_files_exist(name: str):
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # Grafana keeps its database beside what is mounted from here.
    assert service.get("read_only", False) or name == "grafana"
    # One that is built here says who it runs as; so do the others' images, none of which is root's.
    assert service.get("user", "10001") not in ("0", "root")
    assert "privileged" not in service
    assert service.get("network_mode") is None
    for port in service["ports"]:
        assert port.startswith("127.0.0.1:")
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", ["stepserve", "stepserve-gpu"])
def test_a_drain_has_the_time_it_takes(name: str):
    service = COMPOSE["services"][name]
    settings = load_settings(None, service["environment"])
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    # Ray takes some of it to end.
    assert grace_s >= 15 + max(model.engine.drain_s for model in settings.models.values())


def test_nobody_logs_in_with_a_password_that_all_know():
    variables = COMPOSE["services"]["grafana"]["environment"]
    assert variables["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert variables["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert variables["GF_AUTH_BASIC_ENABLED"] == "false"
    assert variables["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_images_of_others_are_pinned(name: str):
    """Those of this repository are built, and of its own version anyway."""
    service = COMPOSE["services"][name]
    if "build" not in service:
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"])
