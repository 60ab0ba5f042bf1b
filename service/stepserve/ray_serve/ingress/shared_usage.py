"""The use of API keys, counted in one place for all ingress replicas."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextvars import Context
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stepserve.api.auth.keys import ApiKey
from stepserve.api.auth.usage import LEASE_S, RENEW_S, Answer, Grant, UsageLedger
from stepserve.domain.errors import NotReadyError
from stepserve.ray_serve.replica_port import listen_on_node_address

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0


class UsageCounter:
    """One ledger, as a Ray Serve deployment of one replica. Begins anew if that replica dies.

    Its methods are coroutines so that all of them run on one event loop, one after another.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        listen_on_node_address()
        self._ledger = UsageLedger(time.monotonic, lease_s)

    async def take(self, key: ApiKey, lease: str) -> Answer:
        """Ask whether a request may go ahead now."""
        return self._ledger.take(key, lease)

    async def renew(self, held: Mapping[str, Collection[str]]) -> None:
        """These leases are still needed."""
        self._ledger.renew(held)

    async def give_back(self, name: str, lease: str) -> None:
        """A request has ended."""
        self._ledger.give_back(name, lease)


class SharedUsage:
    """Asks the counter, and renews the leases of this process for as long as it lives.

    Args:
        counter: Ray Serve handle of a `UsageCounter`.
        renew_s: seconds between two renewals.
    """

    def __init__(self, counter: Any, renew_s: float = RENEW_S) -> None:
        self._counter = counter
        self._renew_s = renew_s
        self._held: dict[str, set[str]] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def take(self, key: ApiKey, lease: str) -> Answer:
        """Ask whether a request may go ahead now.

        Raises:
            NotReadyError: the counter is starting anew.
        """
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew_for_ever(), context=Context())
        try:
            response: Answer = await self._counter.take.remote(key, lease)
        except (RayError, RayServeException) as error:
            message = "the use of API keys cannot be counted right now"
            raise NotReadyError(message, RETRY_AFTER_S) from error
        if isinstance(response, Grant):
            self._held.setdefault(key.name, set()).add(lease)
        return response

    def give_back(self, name: str, lease: str) -> None:
        """A request has ended. If this gets lost, the lease runs out."""
        self._held.get(name, set()).discard(lease)
        # Ray Serve cancels the calls that a cancelled request has made; this one is to arrive.
        Context().run(self._counter.give_back.remote, name, lease)

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            held = {name: tuple(leases) for name, leases in self._held.items() if leases}
            try:
                if held:
                    self._counter.renew.remote(held)
            except Exception:
                # Whatever it was, leases that are never renewed again would all run out.
                logger.exception("the leases of API keys cannot be renewed")
