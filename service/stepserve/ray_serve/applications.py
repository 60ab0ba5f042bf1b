"""The applications of a service on Ray Serve: one for the ingress, and one for each model.

Applications are deployed one by one, so that changing one model touches no other.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.schema import ApplicationStatusOverview

INGRESS_APPLICATION = "stepserve"
INGRESS_DEPLOYMENT = "ingress"
MODEL_PREFIX = "stepserve-model-"
GIVEN_UP = "failed: its processes end while they start; the log says why"
NO_ROOM = re.compile(
    r"Resources required for each replica: (.+?), total resources available: (.+?)\. "
)


@dataclass(frozen=True)
class Listed:
    """A model as Ray Serve lists it.

    Args:
        failure: that it gave the model up; empty where it did not.
        cause: the last line of what Ray Serve says of that; for the log only.
        asleep: whether it was scaled down to no replica, which the next request undoes.
        waiting: what its replicas wait for before they can be started, if it has been long.
    """

    failure: str = ""
    cause: str = ""
    asleep: bool = False
    waiting: str = ""


def model_application(model_id: str) -> str:
    """The Ray Serve application that serves a model."""
    return MODEL_PREFIX + model_id


def deployment_name(model_id: str) -> str:
    """The Ray Serve deployment of a model's replicas."""
    return f"model-{model_id}"


def model_handle(model_id: str) -> Any:
    """A handle of a model's replicas, of which there may be none yet.

    Ray Serve lists an application a moment before its deployment exists, and would raise.
    """
    return serve.get_deployment_handle(
        deployment_name(model_id), model_application(model_id), _check_exists=False
    )


def applications() -> dict[str, ApplicationStatusOverview]:
    """Those that are there now, by name."""
    return dict(serve.status().applications)


async def list_models() -> Mapping[str, Listed]:
    """The models that are there now, by id."""
    found = await asyncio.to_thread(applications)
    return {
        name.removeprefix(MODEL_PREFIX): listed(application)
        for name, application in found.items()
        if name.startswith(MODEL_PREFIX) and application.status != "DELETING"
    }


def listed(application: ApplicationStatusOverview) -> Listed:
    """What its status says of a model."""
    deployments = list(application.deployments.values())
    # One that is unhealthy has lost a replica, and may have others.
    if application.status == "DEPLOY_FAILED":
        told = [d.message for d in deployments if d.message] or [application.message]
        return Listed(failure=GIVEN_UP, cause=_last_line(told[0]))
    asleep = application.status == "RUNNING" and all(
        d.status == "HEALTHY" and not sum(d.replica_states.values()) for d in deployments
    )
    waiting = next(filter(None, (_wanted(d.message) for d in deployments)), "")
    return Listed(asleep=asleep and bool(deployments), waiting=waiting)


def _wanted(message: str) -> str:
    """What a replica needs that no machine has, if that is what Ray Serve says."""
    found = NO_ROOM.search(message)
    if found is None:
        return ""
    return f"waits for room: a replica needs {found[1]}, and the cluster has {found[2]}"


def _last_line(text: str) -> str:
    """Of a message with a traceback, which ends with the error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
