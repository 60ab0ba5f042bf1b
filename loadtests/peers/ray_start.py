"""A local Ray for one of the peers."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from loadtests.peers.common import PeerSettings

# Its default of 5 would have requests wait in the proxy, which asks again after 25 to 500 ms.
NO_LIMIT = {"max_ongoing_requests": 10_000}
OBJECT_STORE_BYTES = 256 * 1024 * 1024


def model_options(settings: PeerSettings) -> dict[str, Any]:
    """All cores for torch: Ray would else set as many OpenMP threads as CPUs are reserved."""
    variables = {"OMP_NUM_THREADS": str(settings.threads)}
    kept = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    variables |= {name: os.environ[name] for name in kept if name in os.environ}
    gpus = 1 if settings.device == "cuda" else 0
    placement = {"num_cpus": 1, "num_gpus": gpus}
    return {"ray_actor_options": placement | {"runtime_env": {"env_vars": variables}}}


def run_until_stopped(application: Any, settings: PeerSettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    stopped = threading.Event()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray asks for a token where a mode is not set, and would keep one of its own for ever.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        num_cpus=max(os.cpu_count() or 1, 3),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=settings.port),
        logging_config=LoggingConfig(enable_access_log=False),
    )
    serve.run(application, route_prefix="/")
    stopped.wait()
    ray.shutdown()
