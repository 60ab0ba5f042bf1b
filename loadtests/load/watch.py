"""Looking at a Stepserve while it is measured: how full its forwards are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

LOOK_EVERY_S = 1.0
DENOISERS = ("unet", "transformer")


@dataclass
class Occupancy:
    """Denoiser forwards that were seen: requests, rows and padded rows, by replica and number."""

    seen: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)

    def add(self, response: dict[str, Any]) -> None:
        """Take in one answer of `/v1/models/{id}/batch`, which holds the latest forwards."""
        for replica, batch in enumerate(response["replicas"]):
            for forward in batch["forwards"]:
                if forward["module"].startswith(DENOISERS):
                    told = len(forward["requests"]), forward["rows"], forward["padded_rows"]
                    self.seen[replica, forward["number"]] = told

    def told(self) -> dict[str, float]:
        """Means over the forwards that were seen; empty if none was."""
        if not self.seen:
            return {}
        requests, rows, padded = zip(*self.seen.values(), strict=True)
        count = len(self.seen)
        return {
            "forwards_seen": float(count),
            "requests_per_forward": sum(requests) / count,
            "rows_per_forward": sum(rows) / count,
            "padded_rows_per_forward": sum(padded) / count,
            "shared_forwards": sum(number > 1 for number in requests) / count,
        }


@asynccontextmanager
async def watched(session: aiohttp.ClientSession, model: str | None) -> AsyncIterator[Occupancy]:
    """Look once a second while the block runs. Servers that tell nothing of the kind: nothing."""
    occupancy = Occupancy()
    task = asyncio.create_task(_look(session, model, occupancy)) if model else None
    try:
        yield occupancy
    finally:
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError, aiohttp.ClientError):
                await task


async def served_model(session: aiohttp.ClientSession) -> str | None:
    """The id of the first model, if the server has a list of them and shows its batches."""
    with suppress(aiohttp.ClientError, ValueError, LookupError):
        async with session.get("/v1/models") as response:
            model: str = (await response.json())["data"][0]["id"]
        async with session.get(f"/v1/models/{model}/batch") as response:
            return model if response.status == 200 else None
    return None


async def _look(session: aiohttp.ClientSession, model: str, occupancy: Occupancy) -> None:
    while True:
        with suppress(aiohttp.ClientError):
            async with session.get(f"/v1/models/{model}/batch") as response:
                if response.status == 200:
                    occupancy.add(await response.json())
        await asyncio.sleep(LOOK_EVERY_S)
