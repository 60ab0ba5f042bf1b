"""Calls of all replicas of a model at once, and the replies of those that are not silent.

Ray Serve's own `results_async` gives every reply or none: while a single replica is silent,
because it hangs or its node was lost and nobody knows yet, it ends in a timeout, and what all
others said is thrown away. So the replies are taken one by one, by what `results_async` is made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from ray.serve.handle import DeploymentBroadcastResponse


async def responses(broadcast: DeploymentBroadcastResponse, timeout_s: float) -> list[Any]:
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


async def _listen(reply: Any, heard: list[Any]) -> None:
    with contextlib.suppress(Exception):
        heard.append(await reply.get_async())
