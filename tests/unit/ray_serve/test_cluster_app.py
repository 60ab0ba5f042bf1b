from __future__ import annotations

import pytest
from stepserve.config import ConfigError
from stepserve.ray_serve.cluster_app import ingress, model, settings_from
from stepserve.ray_serve.exposure import OpenToAllError


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


def test_variables_of_other_models_are_left_to_their_applications():
    """All applications see the variables of the head's pod."""
    variables = {
        "STEPSERVE_MODELS__SDXL__AUTOSCALING__MIN_REPLICAS": "3",
        "STEPSERVE_MODELS__SD_1_5__REPLICAS": "4",
        "STEPSERVE_TELEMETRY__LOG_LEVEL": "debug",
    }

    args = {"models": {"sdxl": {"autoscaling": {"max_replicas": 6}}}}
    sdxl = settings_from(args, variables)
    assert sdxl.models["sdxl"].autoscaling is not None
    assert sdxl.models["sdxl"].autoscaling.min_replicas == 3
    assert sdxl.telemetry.log_level == "debug"
    assert settings_from({"models": {"sd-1.5": {}}}, variables).models["sd-1.5"].replicas == 4
    # The least replicas alone would be more than the most, as they are by default.
    assert settings_from({"default_model": "sdxl"}, variables).default_model == "sdxl"


def test_wrong_variables_of_its_own_model_are_told():
    with pytest.raises(ConfigError, match="STEPSERVE_MODELS__SDXL__REPLICA: unknown variable"):
        settings_from({"models": {"sdxl": {}}}, {"STEPSERVE_MODELS__SDXL__REPLICA": "3"})


def test_an_application_serves_one_model():
    with pytest.raises(ConfigError, match="2 in one application"):
        model({"models": {"one": {}, "two": {}}})


def test_a_cluster_is_not_open_by_oversight():
    with pytest.raises(OpenToAllError):
        ingress({})
