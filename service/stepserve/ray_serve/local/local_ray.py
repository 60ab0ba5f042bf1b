"""A Ray of the service's own, for this machine and for nobody else on it."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping

import ray
from ray._private import auto_init_hook, ray_constants
from ray._private.authentication.authentication_token_setup import _enable_token_auth
from ray.job_config import JobConfig

from stepserve.ray_serve.local.runtime_folder import RuntimeFolder

# On one machine Ray's processes share the cores with the model. Much of what they do is for large
# clusters: at rest the service took 9 % of two cores, and takes 5 % with these.
OF_A_LOCAL_CLUSTER = {
    # Nobody reads what its monitor of log files publishes: lines come through a socket.
    "LOG_NAME_UPDATE_INTERVAL_S": "86400",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    # Ray Serve records no events of its tasks.
    "RAY_task_events_report_interval_ms": "0",
    # Ray's workers step back behind all other processes by 15 unless told otherwise: on a machine
    # that is busy, models took minutes to load, and answers were late.
    "RAY_worker_niceness": "0",
    # There are as many workers as there are actors.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_event_stats": "0",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_metrics_report_interval_ms": "5000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
OBJECT_STORE_BYTES = 256 * 1024 * 1024


def start_local_ray(cpus: int, folder: RuntimeFolder) -> None:
    """Start Ray: its ports on loopback addresses only, behind a token, its files in `folder`."""
    set_defaults(OF_A_LOCAL_CLUSTER)
    _ask_for_token(folder)
    # Else each of its ports listens on all addresses. `_node_ip_address` does not help: Ray puts an
    # address that others reach in place of a loopback one.
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        job_config=job_config(),
        _temp_dir=str(folder.ray),
    )


def job_config() -> JobConfig:
    """A job whose workers import what is installed, and nothing from the current folder."""
    # Jobs of Ray's clients are the ones that Ray does not add this process's folder to.
    return JobConfig(_client_job=True)


def never_start_unasked() -> None:
    """Let no thread start a Ray by using one that is not there any more.

    Ray would: on all addresses, and without a token. Ray Serve's threads may still report what they
    measure when the service has ended its Ray.
    """
    auto_init_hook.enable_auto_connect = False


def joined_address() -> str | None:
    """The cluster that `RAY_ADDRESS` names, if any, which the service joins."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def set_defaults(defaults: dict[str, str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that are not set, or empty."""
    for name, value in defaults.items():
        if not environ.get(name):
            environ[name] = value


def _ask_for_token(folder: RuntimeFolder) -> None:
    """Let Ray's processes refuse whoever does not know the token of this service.

    Whatever the environment says: it is of another cluster, if of any.
    """
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder.token)
    # The variable alone is not enough: Ray may have read its environment when it was imported.
    _enable_token_auth()
