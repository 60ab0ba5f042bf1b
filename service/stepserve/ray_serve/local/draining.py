"""The end of a local service: requests in flight are finished, and every client hears the end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ReplicaState

from stepserve.config import Settings
from stepserve.ray_serve.applications import (
    INGRESS_APPLICATION,
    INGRESS_DEPLOYMENT,
    applications,
    model_application,
    model_handle,
)

logger = logging.getLogger(__name__)

# A forward that runs when the time is over still ends.
SLACK_S = 1.0
# Answers travel from the replicas through the ingress, on a machine that may be busy.
RESPONSES_S = 8.0
# What an ingress takes beyond that: to tell who is late, and to hand over the last bytes.
LEAVING_S = 9.0
LOOK_S = 0.05


def drain(settings: Settings, hurried: threading.Event) -> None:
    """Let every replica finish what it accepted, refusing new work meanwhile.

    All models at once: one that still takes requests while another drains would be cut off in the
    middle of them. Returns when every exchange is over, or as soon as may be once `hurried` is set:
    what is not finished by then is answered with `StoppedError`.
    """
    draining = [
        threading.Thread(
            target=_ask_all, args=(model_handle(model_id), drain_s + SLACK_S, "drain"), daemon=True
        )
        for model_id, drain_s in _with_replicas(settings)
    ]
    for thread in draining:
        thread.start()
    while any(thread.is_alive() for thread in draining) and not hurried.is_set():
        time.sleep(LOOK_S)
    _drain_ingress(0.0 if hurried.is_set() else RESPONSES_S)


def _with_replicas(settings: Settings) -> Iterable[tuple[str, float]]:
    """The models that have a replica, and the seconds that each gets.

    Others have nothing in flight: they sleep, were given up, or still load.
    """
    found = applications()
    for model_id, model in settings.models.items():
        application = found.get(model_application(model_id))
        deployments = application.deployments.values() if application is not None else ()
        if any(deployment.replica_states.get(ReplicaState.RUNNING) for deployment in deployments):
            yield model_id, model.engine.drain_s


def _drain_ingress(within_s: float) -> None:
    handle = serve.get_deployment_handle(
        INGRESS_DEPLOYMENT, INGRESS_APPLICATION, _check_exists=False
    )
    _ask_all(handle, within_s + LEAVING_S, "drain", within_s)


def _ask_all(handle: Any, timeout_s: float, method: str, *arguments: Any) -> None:
    # One that was lost meanwhile has nothing in flight any more.
    with contextlib.suppress(TimeoutError, RayError, RayServeException):
        reply = handle.broadcast(method, *arguments)
        # Nothing is sent before somebody asks for the results.
        reply.results(timeout_s=timeout_s, return_exceptions=True)
