"""Where the port listens that each replica of Ray Serve opens for other replicas."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray._common.network_utils import build_address

AddPort = Callable[[Any, str], int]


def listen_on_node_address() -> None:
    """Let this replica listen on its node's address instead of on all; called by constructors.

    On one machine that is a loopback address. Ray Serve opens the port once its replica's class is
    built, asks for Ray's token there, and has no setting for the address.
    """
    from ray.serve._private import replica

    if not isinstance(replica.add_port_to_grpc_server, partial):
        address = build_address(ray.util.get_node_ip_address(), 0)
        add_port = partial(_add_port_at, address, replica.add_port_to_grpc_server)
        replica.add_port_to_grpc_server = add_port


def _add_port_at(address: str, add_port: AddPort, server: Any, wanted: str) -> int:
    """Open the port at `address` instead of where it was wanted."""
    return add_port(server, address)
