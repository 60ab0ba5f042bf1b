"""What models ask for can be had: from Ray's autoscaler, or from fixed workers."""

from __future__ import annotations

from typing import Any

import pytest
from manifests import OVERLAYS, cluster, settings_of
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _generate_available_node_types_from_ray_cr_spec as node_types_of,
)
from stepserve.config import Settings
from stepserve.ray_serve.application import INGRESS_CPUS, model_target, most_replicas

AUTOSCALED = ("gpu", "high-availability", "incremental-upgrade")
FIXED = tuple(overlay for overlay in OVERLAYS if overlay not in AUTOSCALED)
# What Ray asks for of a kind of accelerator: so little that it is never used up.
KIND_SHARE = 0.001


def demand(settings: Settings, model_id: str) -> dict[str, float]:
    """Resources that Ray looks for when it places a replica, by Ray's names of them."""
    application: Any = model_target(model_id, settings).target
    options = application._bound_deployment.ray_actor_options
    found = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    if kind := options.get("accelerator_type"):
        found[f"accelerator_type:{kind}"] = KIND_SHARE
    return {name: amount for name, amount in found.items() if amount}


def workers(overlay: str) -> dict[str, dict[str, Any]]:
    """Kinds of workers as Ray's own autoscaler reads them off the manifest."""
    found = node_types_of(cluster(overlay))
    return {name: kind for name, kind in found.items() if name != "headgroup"}


def fitting(asked: dict[str, float], resources: dict[str, float]) -> int:
    """How many replicas one worker has room for, beside those that answer HTTP."""
    free = resources | {"CPU": resources["CPU"] - 1}
    assert free["CPU"] >= 2 * INGRESS_CPUS
    return int(min(free.get(name, 0) // amount for name, amount in asked.items()))


@pytest.mark.parametrize("overlay", AUTOSCALED)
def test_the_autoscaler_finds_workers_for_every_replica(overlay: str):
    settings, kinds = settings_of(overlay), workers(overlay)
    assert cluster(overlay)["enableInTreeAutoscaling"]
    assert cluster(overlay)["autoscalerOptions"]["version"] == "v2"
    for model_id, model in settings.models.items():
        asked = demand(settings, model_id)
        room = {name: fitting(asked, kind["resources"]) for name, kind in kinds.items()}
        assert model.autoscaling is not None
        assert model.autoscaling.min_replicas < model.autoscaling.max_replicas
        most = sum(room[name] * kind["max_workers"] for name, kind in kinds.items())
        least = sum(room[name] * kind["min_workers"] for name, kind in kinds.items())
        assert most == model.autoscaling.max_replicas
        assert least == model.autoscaling.min_replicas


@pytest.mark.parametrize("overlay", AUTOSCALED)
def test_every_kind_of_worker_grows_for_somebody(overlay: str):
    settings = settings_of(overlay)
    for name, kind in workers(overlay).items():
        assert kind["min_workers"] < kind["max_workers"], name
        asked = [demand(settings, model_id) for model_id in settings.models]
        assert any(fitting(one, kind["resources"]) for one in asked), name


@pytest.mark.parametrize("overlay", FIXED)
def test_fixed_workers_have_room_for_every_replica(overlay: str):
    """Kueue admits no cluster that scales itself, so as many workers as there may be replicas."""
    settings = settings_of(overlay)
    assert not cluster(overlay).get("enableInTreeAutoscaling")
    assert "autoscalerOptions" not in cluster(overlay)
    for model_id, model in settings.models.items():
        asked = demand(settings, model_id)
        room = [
            group["replicas"] * fitting(asked, workers(overlay)[group["groupName"]]["resources"])
            for group in cluster(overlay)["workerGroupSpecs"]
        ]
        assert sum(room) == most_replicas(model)
    for group in cluster(overlay)["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
