"""Reads the metrics agents of all nodes of the cluster."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import httpx
import ray

from stepserve.telemetry.exposition import merge

TIMEOUT_S = 3.0


async def read_metrics() -> str:
    """All metrics of the application and of Ray Serve, on all nodes."""
    loop = asyncio.get_running_loop()
    nodes = await loop.run_in_executor(None, _agents)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        pages = await asyncio.gather(*(_page(client, address, port) for address, port in nodes))
    by_node = dict(zip(names_of(nodes), pages, strict=True))
    # Parsing takes tens of milliseconds: other requests are not to wait for it.
    return await loop.run_in_executor(None, merge, by_node)


def names_of(nodes: Sequence[tuple[str, int]]) -> Sequence[str]:
    """The address of each node, with its agent's port where several nodes have one address."""
    times = Counter(address for address, _ in nodes)
    return [address if times[address] == 1 else f"{address}:{port}" for address, port in nodes]


def _agents() -> Sequence[tuple[str, int]]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in alive]


async def _page(client: httpx.AsyncClient, address: str, port: int) -> str | None:
    host = f"[{address}]" if ":" in address else address
    try:
        response = await client.get(f"http://{host}:{port}/metrics")
        response.raise_for_status()
    except httpx.HTTPError:
        return None
    return response.text
