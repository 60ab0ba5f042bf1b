"""A whole node of a cluster is lost under load."""

from __future__ import annotations

import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chaos
import cluster_of_nodes
import psutil
import pytest
from chaos import INGRESS, REPLICA, Load, processes_of
from running_service import QUICKLY_LOADED, Service

RAYLET = "raylet"
# More than a request takes of what is left of the service.
NOTICED_S = 5.0
CLIENTS = 16
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# As deploy/kubernetes/base sets them.
CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """A cluster of three nodes, and a service that joined it: one replica on each of two nodes."""

    def __init__(self, folder: Path) -> None:
        variables = os.environ | TOKEN | CLUSTER
        self.cluster = subprocess.Popen(
            [sys.executable, cluster_of_nodes.__file__],
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
            start_new_session=True,
        )
        assert self.cluster.stdout is not None
        address = self.cluster.stdout.readline().strip()
        self.service = Service(
            folder,
            variables=TOKEN
            | {
                "RAY_ADDRESS": address,
                "STEPSERVE_MODELS__EMOJI__REPLICAS": "2",
                # More than half of a node: no two of them go to one.
                "STEPSERVE_MODELS__EMOJI__NUM_CPUS": "1.5",
            },
            engine=QUICKLY_LOADED,
        )

    @property
    def root(self) -> psutil.Process:
        return psutil.Process(self.cluster.pid)

    def processes_by_node(self) -> dict[psutil.Process, list[psutil.Process]]:
        """Each node's raylet, and what it started."""
        raylets = [p for p in self.root.children(recursive=True) if p.name() == RAYLET]
        return {raylet: raylet.children(recursive=True) for raylet in raylets}

    def expendable(self) -> psutil.Process:
        """The raylet of a node that has a replica, and no ingress; it is not the head."""
        ingress = processes_of(self.root, INGRESS)
        replicas = processes_of(self.root, REPLICA)
        for raylet, children in self.processes_by_node().items():
            is_head = "--head" in raylet.cmdline()
            if not is_head and set(children) & set(replicas) and not set(children) & set(ingress):
                return raylet
        raise AssertionError("each node with a replica has an ingress, or is the head")

    def stop(self) -> None:
        self.service.kill()
        self.cluster.terminate()
        self.cluster.communicate(timeout=60)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    running = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        running.service.start()
        yield running
    finally:
        running.stop()


def lose(raylet: psutil.Process) -> None:
    """All of a node's processes are gone at once, and say goodbye to nobody."""
    for process in [raylet, *raylet.children(recursive=True)]:
        process.kill()


def least_in_flight(url: str) -> int:
    """Requests of the replica that has the fewest."""
    return min((len(told["requests"]) for told in chaos.replicas_told(url) or []), default=0)


@pytest.mark.slow
def test_a_lost_node_takes_no_request_with_it(nodes: Nodes, say: Callable[[str], None]) -> None:
    """Each node has a proxy: whoever was connected to the lost one has to ask again."""
    url = nodes.service.url
    chaos.wait_for_replicas(url, 2)
    assert len(nodes.processes_by_node()) == 1 + cluster_of_nodes.WORKERS
    expendable = nodes.expendable()
    with Load(url, first_seed=20_000, clients=CLIENTS, repeat=True) as load:
        chaos.wait(lambda: len(load.responses) >= CLIENTS, "nobody is answered")
        # Of that many some are connected to another node: those are tried again for their clients.
        chaos.wait(lambda: least_in_flight(url) >= 5, "the replicas have little to do")
        usual_s = statistics.median(
            response.ended_s - response.sent_s for response in load.responses
        )
        load.breaks_now()
        lose(expendable)
        load.wait_for_answers_after(8)
    chaos.wait_for_replicas(url, 2)
    again_s = time.monotonic() - load.broken_s
    chaos.wait(lambda: chaos.retried_at(url) > 0, "no request was tried again")
    say(load.tell("node lost", chaos.retried_at(url)))
    say(f"two replicas again after {again_s:.1f} s; before, a request took {usual_s:.1f} s")
    load.check()
    assert {error.status for error in load.errors} <= {0}
    # One of two replicas is left to all of them, and works beside the start of another.
    assert load.recovery_s < NOTICED_S + 2 * usual_s
