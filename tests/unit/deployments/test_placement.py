"""Where Ray is told to put the replicas of a model, and how it chooses between them."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import ModelSettings, Settings
from service.deployments import router
from service.deployments.application import model_target


def options_of(**settings: Any) -> dict[str, Any]:
    configured = Settings(models={"emoji": ModelSettings(**settings)})
    application: Any = model_target("emoji", configured).target
    options: dict[str, Any] = application._bound_deployment.ray_actor_options
    return options


def test_replicas_share_a_device_or_have_one_of_a_kind() -> None:
    half = options_of(num_gpus=0.5)
    assert (half["num_gpus"], half["num_cpus"]) == (0.5, 1.0)
    assert "accelerator_type" not in half
    assert options_of(num_gpus=1, accelerator_type="L4")["accelerator_type"] == "L4"


def test_haproxy_mode_needs_the_router_of_ray_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "RAY_SERVE_ENABLE_HA_PROXY", True)

    with pytest.raises(router.RoutingUnavailableError, match="set `routing: power-of-two`"):
        options_of(replicas=2)
    assert options_of(replicas=2, routing="power-of-two")
