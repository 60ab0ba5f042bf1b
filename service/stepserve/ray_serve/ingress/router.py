"""The batching request router: Ray Serve asks it which replica a request goes to.

Each process that sends requests has a router of its own; `routing/` holds its ledger and
how it decides.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from cachetools import FIFOCache
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from stepserve.domain.errors import StepserveError
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.requests import GenerationRequest
from stepserve.routing.ledger import Ledger
from stepserve.routing.reports import SEPARATE, Job, Report, job_of

REPORT_PERIOD_S = 1.0
# A report goes from the replica to the controller and from there to the routers.
REPORT_DELAY_S = 0.5
# The best one may have gone in the meantime.
RANKS = 3
# Kinds of step caches of which it is known what they skip.
MOST_SHARES = 1024


def router_config(routing: str) -> RequestRouterConfig:
    """For the deployments of models.

    Raises:
        RoutingUnavailableError: in HAProxy mode Ray Serve refuses routers that are not its own.
    """
    if routing == "power-of-two":
        return RequestRouterConfig()
    if RAY_SERVE_ENABLE_HA_PROXY:
        raise RoutingUnavailableError(
            f"routing {routing!r} cannot be had in HAProxy mode (RAY_SERVE_ENABLE_HA_PROXY=1), in "
            "which Ray Serve refuses routers that are not its own: set `routing: power-of-two`"
        )
    return RequestRouterConfig(
        request_router_class="stepserve.ray_serve.ingress.router.BatchingRouter",
        request_routing_stats_period_s=REPORT_PERIOD_S,
    )


class RoutingUnavailableError(StepserveError):
    """Requests cannot be routed as the settings say; the message says why."""


class BatchingRouter(RequestRouter):
    """Sends each request to the replica that should finish it first.

    Calls that make no images go to whichever replica Ray Serve likes.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray Serve before anything else."""
        self._ledger = Ledger(time.monotonic, REPORT_DELAY_S)
        self._reports: dict[ReplicaID, Any] = {}
        self._sent: dict[str, tuple[ReplicaID, Job]] = {}
        # Of the model, as the replicas measured it.
        self._guidance = CLASSIC
        self._run_shares: FIFOCache[str, float] = FIFOCache(MOST_SHARES)
        self._adapters = SEPARATE
        # Requests end on other threads than they are routed on.
        self._lock = threading.Lock()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called when replicas come or go, or have sent a report."""
        super().update_replicas(replicas)
        with self._lock:
            self._ledger.set_replicas([replica.replica_id for replica in replicas])
            for replica in replicas:
                stats = replica.routing_stats
                if stats and stats is not self._reports.get(replica.replica_id):
                    report = Report.from_dict(stats)
                    self._guidance, self._adapters = report.guidance, report.adapters
                    self._run_shares.update(report.run_shares)
                    self._ledger.note_report(replica.replica_id, report)
            self._reports = {replica.replica_id: replica.routing_stats for replica in replicas}
            self._forget_unreported()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called when a replica could not be reached any more."""
        super().on_replica_actor_died(replica_id)
        with self._lock:
            self._ledger.set_replicas([r.replica_id for r in self._replicas_list])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> Sequence[list[RunningReplica]]:
        """The best replicas for a request, best first."""
        if pending_request is None:
            return [candidate_replicas]
        # Else Ray Serve asks again at once, and for ever, where no replica can be reached.
        pending_request.routing_context.should_backoff = True
        request = pending_request.args[0] if pending_request.args else None
        if not isinstance(request, GenerationRequest):
            return [candidate_replicas]
        job = job_of(request, self._guidance, self._run_shares, self._adapters)
        with self._lock:
            ranked = [self._replicas.get(key) for key in self._ledger.choose(job, RANKS)]
            best = [replica for replica in ranked if replica is not None]
            if best:
                # At once: the next request to be routed must count it.
                self._note_sent(pending_request, best[0].replica_id, job)
        if best:
            pending_request.future.add_done_callback(partial(self._note_chosen, pending_request))
        return [[replica] for replica in best] or [candidate_replicas]

    def _note_chosen(self, pending: PendingRequest, choice: asyncio.Future[RunningReplica]) -> None:
        """Ray Serve has chosen a replica, which need not be the best; or the request was cancelled.

        Ray Serve does not report the end of one that was not sent. And what it calls for one that
        a replica took may come after its end.
        """
        name = pending.metadata.internal_request_id
        with self._lock:
            sent = self._sent.get(name)
            if sent is None:
                return
            if choice.cancelled() or choice.exception() is not None:
                self._forget(name)
            else:
                self._note_sent(pending, choice.result().replica_id, sent[1])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called when a request that was sent has ended, however it did."""
        with self._lock:
            self._forget(internal_request_id)

    def _forget(self, name: str) -> None:
        sent = self._sent.pop(name, None)
        if sent is not None:
            self._ledger.note_ended(sent[0], sent[1].id)

    def _forget_unreported(self) -> None:
        """What no replica has in flight: a request may be cancelled right before it is sent."""
        self._sent = {
            name: (replica_id, job)
            for name, (replica_id, job) in self._sent.items()
            if self._ledger.has_in_flight(replica_id, job.id)
        }

    def _note_sent(self, pending: PendingRequest, replica_id: ReplicaID, job: Job) -> None:
        name = pending.metadata.internal_request_id
        before = self._sent.get(name)
        if before is not None and before[0] != replica_id:
            self._ledger.note_ended(before[0], job.id)
        self._sent[name] = replica_id, job
        self._ledger.note_sent(replica_id, job)
