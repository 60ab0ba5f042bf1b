"""How the ingress and each model are deployed on Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ray import serve

from stepserve.api.auth.keys import KeyRing
from stepserve.api.results.store import open_store
from stepserve.config import ModelSettings, Settings
from stepserve.ray_serve import METRIC_VARIABLES
from stepserve.ray_serve.applications import (
    INGRESS_APPLICATION,
    INGRESS_DEPLOYMENT,
    deployment_name,
    model_application,
)
from stepserve.ray_serve.autoscaling import autoscaling_config
from stepserve.ray_serve.exposure import needs_counter, read_access_keys
from stepserve.ray_serve.ingress.ingress import OpenIngress, ProxiedIngress
from stepserve.ray_serve.ingress.router import router_config
from stepserve.ray_serve.ingress.shared_usage import UsageCounter
from stepserve.ray_serve.replica.replica import ModelReplica
from stepserve.ray_serve.result_store import with_secret

OF_EVERY_DEPLOYMENT: Mapping[str, Any] = MappingProxyType(
    {
        # Three that are not answered, and a replica is replaced. It answers between two awaits.
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        # Admission decides inside the replica, where the backlog is known. Ray Serve's own limit
        # only has to be out of the way: a router that finds replicas full retries with 25 to 500 ms
        # of jitter.
        "max_ongoing_requests": 10_000,
        # The ingress writes its own; what Ray Serve asks replicas twice a second is not for people.
        "logging_config": {"enable_access_log": False},
    }
)
INGRESS_CPUS = 0.1
# A crash may be an accident, a model that cannot be loaded is none.
MOST_STARTS = 3
# About a millisecond or two: longer than the Python between two operations.
OPENMP_SPINS = "100000"
# Where engines have more threads than there are cores, the one that is waited for has none.
CROWDED_SPINS = "1000"
# Processes that want to run, for each core. An engine that is running itself is one.
BUSY_LOAD = 2.0


def ingress_target(settings: Settings, listen_path: str | None = None) -> serve.RunTarget:
    """The application that answers HTTP: at a listen socket, or behind Ray Serve's proxies.

    Raises:
        KeysUnreadableError: the API keys are not written as they should be.
        StoreUnusableError: results cannot be kept where the settings say.
    """
    keys = read_access_keys(settings)
    results = with_secret(settings.results)
    # Tried before anything is started.
    open_store(results.address, results.expires_s, results.secret)
    settings = settings.model_copy(update={"results": results})
    ingress = serve.deployment(
        ProxiedIngress if listen_path is None else OpenIngress,
        name=INGRESS_DEPLOYMENT,
        num_replicas=settings.http.ingress_replicas,
        **OF_EVERY_DEPLOYMENT,
        ray_actor_options={
            "num_cpus": INGRESS_CPUS,
            "runtime_env": {"env_vars": dict(METRIC_VARIABLES)},
        },
    )
    counter = _counter(settings, keys)
    at = {} if listen_path is None else {"listen_path": listen_path}
    target = ingress.bind(settings, keys, counter, **at)
    prefix = "/" if listen_path is None else None
    return serve.RunTarget(target, name=INGRESS_APPLICATION, route_prefix=prefix)


def model_target(model_id: str, settings: Settings) -> serve.RunTarget:
    """The application that serves one model, which the ingress alone reaches."""
    model = settings.models[model_id]
    deployment = _model_deployment(model_id, model, is_crowded(settings))
    target = deployment.bind(model_id, model, settings.telemetry)
    return serve.RunTarget(target, name=model_application(model_id), route_prefix=None)


def _counter(settings: Settings, keys: KeyRing) -> Any:
    if not needs_counter(settings, keys):
        return None
    return serve.deployment(
        UsageCounter,
        name="usage",
        num_replicas=1,
        **OF_EVERY_DEPLOYMENT,
        ray_actor_options={"num_cpus": 0},
    ).bind()


def needed_cpus(settings: Settings) -> float:
    """Logical CPUs that all replicas together ask Ray for."""
    models = sum(most_replicas(model) * model.num_cpus for model in settings.models.values())
    return models + settings.http.ingress_replicas * INGRESS_CPUS


def most_replicas(settings: ModelSettings) -> int:
    """Replicas that a model may have."""
    scaling = settings.autoscaling
    return settings.replicas if scaling is None else scaling.max_replicas


def is_crowded(settings: Settings) -> bool:
    """Whether more wants to run at once than this machine has cores.

    That is so if the engines of several models have more threads, or if the machine is as busy with
    other things at this moment.
    """
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] > BUSY_LOAD * cores:
        return True
    models = settings.models.values()
    threads = sum(most_replicas(model) * (model.engine.threads or cores) for model in models)
    return len(settings.models) > 1 and threads > cores


def _model_deployment(model_id: str, settings: ModelSettings, crowded: bool) -> Any:
    scaling = settings.autoscaling
    size: dict[str, Any] = {"num_replicas": settings.replicas}
    if scaling is not None:
        size = {"autoscaling_config": autoscaling_config(scaling)}
    return serve.deployment(
        ModelReplica,
        name=deployment_name(model_id),
        **OF_EVERY_DEPLOYMENT,
        graceful_shutdown_timeout_s=settings.engine.drain_s,
        max_constructor_retry_count=MOST_STARTS,
        # New replicas before the old ones go, where that takes no second device.
        max_surge_percent=0 if settings.num_gpus else 100,
        request_router_config=router_config(settings.routing),
        ray_actor_options=_placement(settings)
        | {"runtime_env": {"env_vars": _thread_variables(settings, crowded) | METRIC_VARIABLES}},
        **size,
    )


def _placement(settings: ModelSettings) -> dict[str, Any]:
    """What Ray looks for in a node that is to have a replica."""
    placement: dict[str, Any] = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    kind = settings.accelerator_type
    return placement if kind is None else placement | {"accelerator_type": kind}


def _thread_variables(settings: ModelSettings, crowded: bool) -> dict[str, str]:
    """OpenMP must know before torch is imported.

    Threads that spin for long while they wait take the cores from the data plane; threads that
    sleep at once wake too late for the many short operations of a small model. A short spin bridges
    the gap between two operations and no more. On a crowded machine whom they wait for may want the
    very core that they spin on: there they all but sleep at once.
    """
    threads = settings.engine.threads or os.cpu_count() or 1
    spins = CROWDED_SPINS if crowded else OPENMP_SPINS
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spins}
