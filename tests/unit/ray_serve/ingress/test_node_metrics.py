"""Which node a number of the metrics page is of."""

from __future__ import annotations

from stepserve.ray_serve.ingress.node_metrics import names_of


def test_nodes_are_told_apart() -> None:
    nodes = [("10.0.0.1", 8080), ("10.0.0.2", 8080), ("10.0.0.1", 8081)]
    assert names_of(nodes) == ["10.0.0.1:8080", "10.0.0.2", "10.0.0.1:8081"]
