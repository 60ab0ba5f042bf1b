"""What the router remembers of requests, over what Ray Serve really calls, and when."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest
from stepserve.domain.guidance import Guidance, StepWork
from stepserve.domain.requests import GenerationRequest
from stepserve.ray_serve.ingress import router as router_module
from stepserve.ray_serve.ingress.router import BatchingRouter
from stepserve.routing.reports import Report

DEPLOYMENT = DeploymentID("model-emoji", "stepserve-emoji")


@dataclass
class Replica:
    """As much of a running replica as a router looks at."""

    name: str
    max_ongoing_requests: int = 10
    routing_stats: dict[str, Any] = field(default_factory=dict)

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 1


def a_router(*replicas: Replica) -> BatchingRouter:
    router = BatchingRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    router.initialize_state()
    router.update_replicas(cast(Any, list(replicas)))
    return router


def pending(name: str = "r") -> PendingRequest:
    request = GenerationRequest(name, "emoji", "pizza", 64, 64, 4, 4.0, 1, "DDIMScheduler")
    return PendingRequest([request], {}, RequestMetadata(f"http-{name}", f"call-{name}"))


def remembered(router: BatchingRouter) -> dict[str, str]:
    """Where requests are thought to be; the ledger must think so too."""
    for replica_id, job in router._sent.values():
        assert router._ledger.has_in_flight(replica_id, job.id)
    in_flight = sum(len(account.jobs) for account in router._ledger._accounts.values())
    assert in_flight == len(router._sent)
    return {name: replica_id.unique_id for name, (replica_id, _) in router._sent.items()}


async def test_a_request_is_remembered_where_it_went_up_to_its_end() -> None:
    router = a_router(Replica("full", max_ongoing_requests=0), Replica("free"))
    for name in "abcdefgh":
        chosen = await router._choose_replica_for_request(pending(name))
        await asyncio.sleep(0)
        assert remembered(router) == {f"call-{name}": "free"}
        router.on_request_completed(chosen.replica_id, f"call-{name}")
        assert remembered(router) == {}


async def test_one_that_was_cancelled_before_it_was_sent_is_forgotten() -> None:
    router = a_router(Replica("full", max_ongoing_requests=0))
    choosing = asyncio.create_task(router._choose_replica_for_request(pending()))
    async with asyncio.timeout(5):
        while not remembered(router):
            await asyncio.sleep(0)
    choosing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await choosing
    await asyncio.sleep(0)
    assert remembered(router) == {}


async def test_the_end_may_come_before_anything_else_is_told() -> None:
    router = a_router(Replica("a"), Replica("b"))
    request = pending()
    chosen = await router._choose_replica_for_request(request)
    router.on_request_completed(chosen.replica_id, "call-r")
    router.on_request_routed(request, chosen.replica_id, cast(Any, None))
    await asyncio.sleep(0)
    assert remembered(router) == {}


async def test_what_guidance_costs_is_as_the_replicas_measured_it() -> None:
    router = a_router(Replica("a"))
    await router._choose_replica_for_request(pending("before"))
    embedded = Guidance("guidance_scale", 1.0, False, False, StepWork(), StepWork())
    twice = replace(embedded, guided=StepWork(rows=1, calls=2))
    for guidance, work in ((embedded, (1, 4)), (twice, (1, 8))):
        told = json.loads(json.dumps(Report(guidance=guidance).to_dict()))
        assert Report.from_dict(told).guidance == guidance
        router.update_replicas(cast(Any, [Replica("a", routing_stats=told)]))
        await router._choose_replica_for_request(pending(f"{work}"))
        job = router._sent[f"call-{work}"][1]
        assert (job.rows, job.steps) == work
    assert router._sent["call-before"][1].rows == 2


async def test_what_no_replica_reports_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled between the choice and the sending, of which nobody is told."""
    monkeypatch.setattr(router_module, "REPORT_DELAY_S", 0.0)
    router = a_router(Replica("a"))
    await router._choose_replica_for_request(pending())
    await asyncio.sleep(0)
    assert remembered(router) == {"call-r": "a"}
    router.update_replicas(cast(Any, [Replica("a", routing_stats=Report().to_dict())]))
    assert remembered(router) == {}
