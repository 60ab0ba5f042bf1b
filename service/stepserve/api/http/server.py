"""The HTTP server of our own, with limits: uvicorn, where nothing else stands before it."""

from __future__ import annotations

from functools import partial
from typing import cast

import uvicorn
from fastapi import FastAPI

from stepserve.api.http.open_connections import OpenConnections
from stepserve.api.http.protocol import LimitedHttpProtocol
from stepserve.api.http.refusals import Refusals
from stepserve.config import HttpSettings


def make_server(app: FastAPI, limits: HttpSettings, max_connections: int) -> uvicorn.Server:
    """Return a server of an app that `create_app` made; its `serve` takes the sockets to listen on.

    Args:
        max_connections: how many may be open at once.
    """
    refusals = Refusals(app.state.observation.listeners)
    connections = OpenConnections(max_connections)
    protocol = partial(LimitedHttpProtocol, limits, connections, refusals)
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
