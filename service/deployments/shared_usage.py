"""The use of API keys, counted in one Ray actor for all ingress replicas."""

from __future__ import annotations

import time
from typing import Any

import ray

from service.api.keys import ApiKey
from service.api.usage import Answer, UsageLedger

ACTOR = "stepserve-usage"
NAMESPACE = "stepserve"


class UsageActor:
    """One ledger behind one queue of calls."""

    def __init__(self, lease_s: float) -> None:
        self._ledger = UsageLedger(time.monotonic, lease_s)

    def take(self, key: ApiKey) -> Answer:
        """Ask whether a request may go ahead now."""
        return self._ledger.take(key)

    def give_back(self, name: str, lease: int) -> None:
        """A request has ended."""
        self._ledger.give_back(name, lease)


class SharedUsage:
    """Asks the actor, which the first ingress replica makes and which outlives it."""

    def __init__(self, lease_s: float) -> None:
        make: Any = ray.remote(UsageActor)
        self._actor = make.options(
            name=ACTOR,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
        ).remote(lease_s)

    async def take(self, key: ApiKey) -> Answer:
        """Ask whether a request may go ahead now."""
        answer: Answer = await self._actor.take.remote(key)
        return answer

    async def give_back(self, name: str, lease: int) -> None:
        """A request has ended. Nobody waits for that."""
        self._actor.give_back.remote(name, lease)
