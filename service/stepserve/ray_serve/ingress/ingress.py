"""The ingress: the FastAPI application of `api/` on Ray Serve.

On a cluster Ray Serve's proxies hand it HTTP, from whichever node they are on. On one machine it
serves HTTP itself, as a proxy took 10 ms of CPU time a request there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from stepserve.api.app import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import KeyRing
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.http.in_flight import InFlight
from stepserve.api.http.open_connections import affordable_connections
from stepserve.api.http.server import make_server
from stepserve.api.results.store import open_store
from stepserve.config import Settings
from stepserve.ray_serve.heap import (
    INGRESS_TRIM_INTERVAL_S,
    heap_trimmer,
    keep_large_blocks_apart,
)
from stepserve.ray_serve.ingress.exchange_reports import count_retries, observe
from stepserve.ray_serve.ingress.remote_backend import RemoteBackend
from stepserve.ray_serve.ingress.shared_usage import SharedUsage
from stepserve.ray_serve.listen_socket import receive_listen_socket
from stepserve.ray_serve.replica_port import listen_on_node_address
from stepserve.telemetry.flusher import Flusher

# How long clients may take to fetch the last bytes.
LEAVE_S = 4.0

logger = logging.getLogger(__name__)


@serve.ingress()
class ProxiedIngress:
    """Behind Ray Serve's proxies. Built on its replica: neither the app nor its state is pickled.

    Args:
        settings: everything that an operator may set.
        keys: who may call; read by the starter of the service, as their file may be there only.
        counter: handle of what counts the use of keys, where there are several ingress replicas.
    """

    def __init__(self, settings: Settings, keys: KeyRing, counter: Any = None) -> None:
        listen_on_node_address()
        # The proxies add the id to every response.
        self.build = partial(build_app, settings, keys, counter, echo_request_id=False)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        app = self.build()
        self.in_flight: InFlight = app.state.in_flight
        return app

    async def drain(self, within_s: float) -> None:
        """Return once nothing is in flight; what is late ends in the error of a stopped server."""
        await self.in_flight.settle(within_s)


class OpenIngress:
    """At the listen socket of a local service, which its starter holds; built on its replica.

    Args:
        listen_path: where the listen socket is handed out.
    """

    def __init__(
        self, settings: Settings, keys: KeyRing, counter: Any = None, *, listen_path: str
    ) -> None:
        listen_on_node_address()
        app = build_app(settings, keys, counter, echo_request_id=True)
        self.in_flight: InFlight = app.state.in_flight
        self.drained = False
        most = affordable_connections(settings.http.max_connections)
        self.server = make_server(app, settings.http, most)
        # Ray Serve calls constructors inside the event loop that their replica's methods run in.
        self.serving = asyncio.create_task(self.server.serve([receive_listen_socket(listen_path)]))

    async def drain(self, within_s: float) -> None:
        """Take no more connections once nothing is in flight.

        What takes longer than `within_s` ends in the error of a stopped server. Returns when the
        last bytes are handed over, or after a while.
        """
        self.drained = True
        late = await self.in_flight.settle(within_s)
        if late:
            logger.warning("%d requests ended in the error of a stopped server", late)
        self.server.should_exit = True
        await asyncio.wait({self.serving}, timeout=LEAVE_S)

    async def check_health(self) -> None:
        """Called by Ray Serve every now and then; an ingress that has given up is replaced."""
        if self.serving.done() and not self.drained:
            raise RuntimeError("HTTP is not served any more") from self.serving.exception()


def build_app(settings: Settings, keys: KeyRing, counter: Any, *, echo_request_id: bool) -> FastAPI:
    """The application, with everything that it needs of this process."""
    keep_large_blocks_apart()
    if (trim := heap_trimmer()) is not None:
        Flusher(trim, INGRESS_TRIM_INTERVAL_S, "heap").start()
    observation = observe(settings.telemetry)
    aliases = {model_id: model.aliases for model_id, model in settings.models.items()}
    compiled = {model_id for model_id, model in settings.models.items() if model.compile}
    backend = RemoteBackend(count_retries(), aliases, compiled)
    usage = LocalUsage(time.monotonic) if counter is None else SharedUsage(counter)
    results, access = settings.results, Access(keys, usage)
    store = open_store(results.address, results.expires_s, results.secret)
    return create_app(
        backend, settings, store, access, observation, echo_request_id=echo_request_id
    )
