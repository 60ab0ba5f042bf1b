"""The port that each replica opens for other replicas."""

from __future__ import annotations

import pytest
import ray
from ray.serve._private import replica
from stepserve.ray_serve.replica_port import listen_on_node_address


@pytest.mark.parametrize(
    ("node", "address"),
    [("127.0.0.1", "127.0.0.1:0"), ("10.0.0.7", "10.0.0.7:0"), ("::1", "[::1]:0")],
)
def test_it_listens_on_the_address_of_its_node(
    monkeypatch: pytest.MonkeyPatch, node: str, address: str
) -> None:
    opened = []

    def add_port(server: str, at: str) -> int:
        opened.append((server, at))
        return 1234

    monkeypatch.setattr(replica, "add_port_to_grpc_server", add_port)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    # Constructors of several classes may call it in one process.
    listen_on_node_address()
    listen_on_node_address()
    assert replica.add_port_to_grpc_server("server", "[::]:0") == 1234
    assert opened == [("server", address)]
