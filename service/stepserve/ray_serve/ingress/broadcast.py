"""Calls of all replicas of a model at once, and the replies of those that are not silent.

Ray Serve's own `results_async` gives every reply or none: while a single replica is silent,
because it hangs or its node was lost and nobody knows yet, it ends in a timeout, and what all
others said is thrown away. So the replies are taken one by one, by what `results_async` is made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol


class Reply(Protocol):
    """Of one replica: Ray Serve's `ReplicaResult`."""

    def get_async(self) -> Awaitable[Any]:
        """What it returns."""
        ...


class Broadcast(Protocol):
    """A call of all replicas: Ray Serve's `DeploymentBroadcastResponse`."""

    def _fetch_replica_results_async(self) -> Awaitable[Sequence[Reply]]: ...


async def responses(broadcast: Broadcast, timeout_s: float) -> list[Any]:
    """What replicas return within `timeout_s`; of those that fail or are silent, nothing.

    Raises:
        TimeoutError: the call could not be sent in time.
        RayServeException: there is no replica.
    """
    deadline_s = time.monotonic() + timeout_s
    awaited = await asyncio.wait_for(broadcast._fetch_replica_results_async(), timeout_s)
    heard: list[Any] = []
    listening = [asyncio.create_task(_listen(reply, heard)) for reply in awaited]
    if not listening:
        return []
    try:
        await asyncio.wait(listening, timeout=max(deadline_s - time.monotonic(), 0))
    finally:
        for task in listening:
            task.cancel()
    return heard


async def _listen(reply: Reply, heard: list[Any]) -> None:
    with contextlib.suppress(Exception):
        heard.append(await reply.get_async())
