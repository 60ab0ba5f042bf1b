"""What Ray Serve's statuses say of models."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)
from stepserve.ray_serve.applications import GIVEN_UP, Listed, listed

TRACEBACK = """The deployment failed to start 3 times in a row:
Traceback (most recent call last):
  File "x.py", line 1
RuntimeError: out of memory
"""

NO_ROOM = (
    "Deployment 'model-emoji' in application 'stepserve-model-emoji' has 1 replicas that have "
    "taken more than 30s to be scheduled. This may be due to waiting for the cluster to auto-scale "
    "or for a runtime environment to be installed. Resources required for each replica: "
    '{"CPU": 1.0, "GPU": 1.0}, total resources available: {"CPU": 4.9}. '
    "Use `ray status` for more details."
)


def an_application(
    status: str = "RUNNING", replicas: int = 1, message: str = "", health: str = "HEALTHY"
) -> ApplicationStatusOverview:
    states: dict[Any, int] = {ReplicaState.RUNNING: replicas} if replicas else {}
    deployment = DeploymentStatusOverview(
        DeploymentStatus(health), DeploymentStatusTrigger.UNSPECIFIED, states, message
    )
    return ApplicationStatusOverview(
        ApplicationStatus(status), "", 0.0, {"model-emoji": deployment}
    )


def test_one_that_runs() -> None:
    assert listed(an_application()) == Listed()


def test_one_that_was_given_up_says_why_in_a_line() -> None:
    failed = an_application("DEPLOY_FAILED", 0, TRACEBACK, "DEPLOY_FAILED")
    assert listed(failed) == Listed(failure=GIVEN_UP, cause="RuntimeError: out of memory")


@pytest.mark.parametrize("replicas", [0, 1])
def test_one_that_lost_a_replica_may_have_others(replicas: int) -> None:
    assert listed(an_application("UNHEALTHY", replicas, "health check failed", "UNHEALTHY")) == (
        Listed()
    )


def test_one_without_replicas_sleeps_unless_it_is_starting() -> None:
    assert listed(an_application(replicas=0)) == Listed(asleep=True)
    assert listed(an_application("DEPLOYING", 0, health="UPDATING")) == Listed()
    assert listed(an_application("RUNNING", 0, health="UPSCALING")) == Listed()


def test_one_that_no_machine_has_room_for_says_what_it_needs() -> None:
    waits = listed(an_application("DEPLOYING", 0, NO_ROOM, "UPDATING"))
    assert waits.waiting == (
        'waits for room: a replica needs {"CPU": 1.0, "GPU": 1.0}, and the cluster has {"CPU": 4.9}'
    )
