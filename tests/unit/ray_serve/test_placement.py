"""Where Ray is told to put the replicas of a model, and how it chooses between them."""

from __future__ import annotations

from typing import Any

import pytest
from stepserve.config import EngineSettings, ModelSettings, Settings
from stepserve.ray_serve.application import CROWDED_SPINS, OPENMP_SPINS, model_target
from stepserve.ray_serve.ingress import router


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


def spins_of(**models: ModelSettings) -> set[str]:
    settings = Settings(models=models)
    targets: list[Any] = [model_target(model_id, settings).target for model_id in models]
    options = [target._bound_deployment.ray_actor_options for target in targets]
    return {told["runtime_env"]["env_vars"]["GOMP_SPINCOUNT"] for told in options}


def test_engines_that_outnumber_the_cores_spin_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that spins keeps the core that the thread it waits for would need."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (4.5, 0.0, 0.0))
    team, half, single = (
        ModelSettings(engine=EngineSettings(threads=threads)) for threads in (None, 2, 1)
    )
    assert spins_of(a=team) == {OPENMP_SPINS}
    assert spins_of(a=half, b=half) == {OPENMP_SPINS}
    assert spins_of(a=single, b=single, c=single, d=single) == {OPENMP_SPINS}
    assert spins_of(a=team, b=single) == {CROWDED_SPINS}
    assert spins_of(a=team, b=team, c=team) == {CROWDED_SPINS}


def test_engines_on_a_busy_machine_spin_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 0.0, 0.0))
    assert spins_of(a=ModelSettings()) == {CROWDED_SPINS}
