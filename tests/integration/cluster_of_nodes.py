"""Several Ray nodes on one machine, for as long as this process lives: python cluster_of_nodes.py

Prints the address of the cluster when all are there.
"""

from __future__ import annotations

import signal
import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 100 * 2**20
WORKERS = 2


def main() -> None:
    """Start them, tell where, and wait to be ended."""
    # The head has room for the ingress, and for a replica whose node was lost.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        },
    )
    for _ in range(WORKERS):
        cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
    print(cluster.address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    cluster.shutdown()
    sys.exit(0)


if __name__ == "__main__":
    main()
