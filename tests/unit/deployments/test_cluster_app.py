from __future__ import annotations

import pytest

from service.config import ConfigError
from service.deployments.cluster_app import ingress, model, settings_from
from service.deployments.exposure import OpenToAllError


def test_arguments_are_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEPSERVE_HTTP__ALLOW_ANONYMOUS", "true")
    settings = settings_from({"models": {"emoji": {"replicas": 2}}})

    assert settings.models["emoji"].replicas == 2
    assert settings.http.host == "0.0.0.0"
    assert settings.http.allow_anonymous


def test_the_ingress_need_not_know_the_models():
    assert settings_from({"default_model": "sdxl"}).default_model == "sdxl"


def test_wrong_ones_are_told():
    with pytest.raises(ConfigError, match="models\\.emoji\\.replicas"):
        settings_from({"models": {"emoji": {"replica": 2}}})


def test_an_application_serves_one_model():
    with pytest.raises(ConfigError, match="2 in one application"):
        model({"models": {"one": {}, "two": {}}})


def test_a_cluster_is_not_open_by_oversight():
    with pytest.raises(OpenToAllError):
        ingress({})
