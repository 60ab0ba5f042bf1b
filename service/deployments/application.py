"""The Ray Serve application: one ingress, and one deployment for each model."""

from __future__ import annotations

import os
from typing import Any

from ray import serve

from service.api.keys import KeyRing
from service.config import ModelSettings, Settings
from service.deployments.exposure import needs_counter, read_access_keys
from service.deployments.ingress import Ingress
from service.deployments.replica import ModelReplica, ReplicaSpec
from service.deployments.result_store import check_results, with_secret
from service.deployments.shared_usage import UsageCounter
from service.models.catalogue import model_folder

APPLICATION = "stepserve"
HEALTH_CHECK_PERIOD_S = 2.0
# Admission decides inside the replica, where the backlog is known. Ray Serve's own limit only has
# to be out of the way: a router that finds replicas full retries with 25 to 500 ms of jitter.
NO_LIMIT_OF_ITS_OWN = 10_000
INGRESS_CPUS = 0.1
# About a millisecond or two: longer than the Python between two operations.
OPENMP_SPINS = "100000"


def build_application(settings: Settings) -> Any:
    """Bind the ingress and all models of `settings` into one application.

    Raises:
        ModelNotFoundError: a configured model does not exist.
        KeysUnreadableError: the API keys are not written as they should be.
        StoreUnusableError: results cannot be kept where the settings say.
    """
    keys = read_access_keys(settings)
    settings = settings.model_copy(update={"results": with_secret(settings.results)})
    check_results(settings.results)
    handles = {
        model_id: _model_deployment(model_id, model).bind(
            ReplicaSpec(model_id, model_folder(model.path), model, settings.telemetry)
        )
        for model_id, model in settings.models.items()
    }
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=settings.http.ingress_replicas,
        max_ongoing_requests=NO_LIMIT_OF_ITS_OWN,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
    )
    return ingress.bind(settings, handles, keys, _counter(settings, keys))


def _counter(settings: Settings, keys: KeyRing) -> Any:
    if not needs_counter(settings, keys):
        return None
    return serve.deployment(
        UsageCounter,
        name="usage",
        num_replicas=1,
        max_ongoing_requests=NO_LIMIT_OF_ITS_OWN,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0},
    ).bind()


def deployment_name(model_id: str) -> str:
    """The Ray Serve deployment that serves a model."""
    return f"model-{model_id}"


def needed_cpus(settings: Settings) -> float:
    """Logical CPUs that all replicas together ask Ray for."""
    models = sum(model.replicas * model.num_cpus for model in settings.models.values())
    return models + settings.http.ingress_replicas * INGRESS_CPUS


def _model_deployment(model_id: str, settings: ModelSettings) -> Any:
    return serve.deployment(
        ModelReplica,
        name=deployment_name(model_id),
        num_replicas=settings.replicas,
        max_ongoing_requests=NO_LIMIT_OF_ITS_OWN,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=settings.engine.drain_s,
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": _thread_variables(settings)},
        },
    )


def _thread_variables(settings: ModelSettings) -> dict[str, str]:
    """OpenMP must know before torch is imported.

    Threads that spin for long while they wait take the cores from the data plane; threads that
    sleep at once wake too late for the many short operations of a small model. A short spin bridges
    the gap between two operations and no more.
    """
    threads = settings.engine.threads or os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": OPENMP_SPINS}
