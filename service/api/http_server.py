"""The HTTP server of our own, with limits: uvicorn, where nothing else stands before it."""

from __future__ import annotations

from typing import cast

import uvicorn
from starlette.types import ASGIApp

from service.api.http_protocol import ConnectionLimits, limited_protocol
from service.api.open_connections import OpenConnections


def make_server(app: ASGIApp, limits: ConnectionLimits, max_connections: int) -> uvicorn.Server:
    """Return a server of `app`; its `serve` takes the sockets to listen on.

    Args:
        max_connections: how many may be open at once.
    """
    protocol = limited_protocol(limits, OpenConnections(max_connections))
    config = uvicorn.Config(
        app,
        # uvicorn only ever calls it.
        http=cast(type, protocol),
        lifespan="on",
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        timeout_keep_alive=cast(int, limits.keep_alive_s),
    )
    return uvicorn.Server(config)
