"""The ingress: the FastAPI application of `api/` on Ray Serve.

On a cluster Ray Serve's proxies hand it HTTP, from whichever node they are on. On one machine it
answers HTTP itself, as a proxy took 10 ms of CPU time a request there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve

from service.api.access import Access
from service.api.app import create_app
from service.api.head_limits import HeadLimits
from service.api.http_protocol import ConnectionLimits
from service.api.http_server import make_server
from service.api.in_flight import InFlight
from service.api.keys import KeyRing
from service.api.open_connections import affordable_connections
from service.api.results import open_store
from service.api.settings import ApiSettings
from service.api.uploads import UploadLimits
from service.api.usage import LocalUsage
from service.config import HttpSettings, Settings
from service.deployments.door import borrow_door
from service.deployments.heap import (
    INGRESS_TRIM_INTERVAL_S,
    heap_trimmer,
    keep_large_blocks_apart,
)
from service.deployments.observing import count_retries, observe
from service.deployments.remote_backend import RemoteBackend
from service.deployments.replica_port import listen_on_node_address
from service.deployments.shared_usage import SharedUsage
from service.telemetry.flusher import Flusher

# How long clients may take to fetch the last bytes.
LEAVE_S = 4.0

logger = logging.getLogger(__name__)


@serve.ingress()
class ProxiedIngress:
    """Behind Ray Serve's proxies. Built on its replica: neither the app nor its state is pickled.

    Args:
        settings: everything that an operator may set.
        keys: who may call; read by whoever starts the service, as their file may be there only.
        counter: handle of what counts the use of keys, where there are several ingress replicas.
    """

    def __init__(self, settings: Settings, keys: KeyRing, counter: Any = None) -> None:
        listen_on_node_address()
        # The proxies add the id to every answer.
        self.build = partial(build_app, settings, keys, counter, echo_request_id=False)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        app = self.build()
        self.in_flight: InFlight = app.state.in_flight
        return app

    async def drain(self, within_s: float) -> None:
        """Return once all that is in flight is answered; who is late is told of the stop."""
        await self.in_flight.settle(within_s)


class OpenIngress:
    """At the door of a local service, which its starter holds; built on its replica, as the other.

    Args:
        door: where to borrow the listening socket.
    """

    def __init__(
        self, settings: Settings, keys: KeyRing, counter: Any = None, *, door: str
    ) -> None:
        listen_on_node_address()
        app = build_app(settings, keys, counter, echo_request_id=True)
        self.in_flight: InFlight = app.state.in_flight
        self.drained = False
        most = affordable_connections(settings.http.max_connections)
        self.server = make_server(app, connection_limits(settings.http), most)
        # Ray Serve calls constructors inside the event loop that their replica's methods run in.
        self.serving = asyncio.create_task(self.server.serve([borrow_door(door)]))

    async def drain(self, within_s: float) -> None:
        """Take no more connections once all that is in flight is answered.

        What is not answered within `within_s` is told that the service stops. Returns when the last
        bytes are handed over, or after a while.
        """
        self.drained = True
        late = await self.in_flight.settle(within_s)
        if late:
            logger.warning("%d requests were told that the service stops", late)
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
    backend = RemoteBackend(count_retries(), aliases)
    usage = LocalUsage(time.monotonic) if counter is None else SharedUsage(counter)
    results = settings.results
    store = open_store(results.address, results.expires_s, results.secret)
    http = settings.http
    api_settings = ApiSettings(
        default_model=settings.default_model,
        max_body_bytes=http.max_body_bytes,
        request_timeout_s=http.request_timeout_s,
        echo_request_id=echo_request_id,
        max_upload_bytes=http.max_upload_bytes,
        max_bodies_bytes=http.max_bodies_bytes,
        body_timeout_s=http.body_timeout_s,
        head=head_limits(http),
        cors_origins=http.cors_origins,
        public_url=results.public_url,
        uploads=UploadLimits(**settings.uploads.model_dump()),
    )
    return create_app(backend, api_settings, store, Access(keys, usage), observation)


def head_limits(http: HttpSettings) -> HeadLimits:
    """What is taken of URLs and headers."""
    return HeadLimits(http.max_url_bytes, http.max_header_bytes, http.max_headers)


def connection_limits(http: HttpSettings) -> ConnectionLimits:
    """What one connection may take of a server of our own."""
    return ConnectionLimits(
        head_limits(http), http.header_timeout_s, http.send_timeout_s, http.keep_alive_s
    )
