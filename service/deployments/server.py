"""The life of a local service: start Ray, deploy, wait until ready, serve, drain, stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from service.config import Settings
from service.deployments.application import (
    APPLICATION,
    build_application,
    deployment_name,
    needed_cpus,
)
from service.deployments.exposure import check_exposure
from service.domain.errors import StepserveError
from service.telemetry.log_sink import log_sink
from service.telemetry.logs import FORMAT_VARIABLE, SINK_VARIABLE, resolved_format

READY_TIMEOUT_S = 600.0
READY_POLL_S = 0.1
FLUSH_S = 0.3
METRICS_INTERVAL_MS = 2000
OBJECT_STORE_BYTES = 256 * 1024 * 1024
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - to be replaced, not bound


class StartError(StepserveError):
    """The service did not become ready; the message says why."""


def base_url(settings: Settings) -> str:
    """Where this machine reaches the service."""
    host = ANY_ADDRESS.get(settings.http.host, settings.http.host)
    return f"http://{host}:{settings.http.port}"


def serve_until_stopped(settings: Settings, when_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain and return.

    Args:
        settings: what to serve, and where.
        when_ready: called once with the base URL; the service keeps serving meanwhile.

    Raises:
        ModelNotFoundError: a configured model does not exist.
        OpenToAllError: other machines could use it without an API key, and nobody said they may.
        KeysUnreadableError: the API keys are not written as they should be.
        StoreUnusableError: results cannot be kept where the settings say.
        StartError: the address is taken, a model failed to load, or the service was not ready in
            time.
    """
    check_exposure(settings)
    application = build_application(settings)
    check_address(settings.http.host, settings.http.port)
    with _stop_signals() as stopped, _logs_come_here(settings):
        start_ray(settings)
        try:
            # Again: Ray has put handlers of its own in place, which end the process on SIGTERM.
            _listen(stopped)
            deploy(application)
            if wait_until_ready(settings, stopped):
                when_ready(base_url(settings))
                stopped.wait()
                drain(settings)
        finally:
            stop_ray()


def check_address(host: str, port: int) -> None:
    """Return if the address is free. Ray would share it with another service of ours, unasked.

    Raises:
        StartError: somebody listens there, or it is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise StartError(f"cannot listen on {host} port {port}: {reason}") from error


def start_ray(settings: Settings) -> None:
    """Start a local Ray, or join the cluster that `RAY_ADDRESS` names."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        # A cluster of this machine alone: its control ports listen for local processes.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_metrics_report_interval_ms", str(METRICS_INTERVAL_MS))
        ray.init(
            num_cpus=max(os.cpu_count() or 1, round(needed_cpus(settings) + 0.5)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    http = HTTPOptions(host=settings.http.host, port=settings.http.port)
    serve.start(http_options=http, logging_config=LoggingConfig(enable_access_log=False))


def deploy(application: Any) -> None:
    """Hand the application to Ray Serve without waiting for its models."""
    target = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def wait_until_ready(settings: Settings, stopped: threading.Event) -> bool:
    """Poll readiness through HTTP; False if `stopped` was set meanwhile.

    Raises:
        StartError: a deployment failed, or readiness took too long.
    """
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=base_url(settings), timeout=5, trust_env=False) as client:
        while not stopped.wait(READY_POLL_S):
            if _is_ready(client):
                return True
            _raise_if_failed()
            if time.monotonic() > deadline_s:
                raise StartError(f"the service was not ready within {READY_TIMEOUT_S:.0f} s")
    return False


def drain(settings: Settings) -> None:
    """Let every replica finish what it accepted, refusing new work meanwhile."""
    for model_id, model in settings.models.items():
        handle = serve.get_deployment_handle(deployment_name(model_id), APPLICATION)
        replies = handle.broadcast("drain")
        replies.results(timeout_s=model.engine.drain_s + FLUSH_S)
    # The last answers are on their way through ingress and proxy.
    time.sleep(FLUSH_S)


def stop_ray() -> None:
    """Take the application off a cluster that was joined, and leave Ray or end the local one."""
    if "RAY_ADDRESS" in os.environ:
        serve.delete(APPLICATION)
    ray.shutdown()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _raise_if_failed() -> None:
    application = serve.status().applications.get(APPLICATION)
    if application is None or application.status not in ("DEPLOY_FAILED", "UNHEALTHY"):
        return
    reasons = [d.message for d in application.deployments.values() if d.message]
    raise StartError("\n".join([f"deployment failed: {application.message}", *reasons]))


@contextmanager
def _logs_come_here(settings: Settings) -> Iterator[None]:
    """Let the processes of a local service log to this one's stderr."""
    if "RAY_ADDRESS" in os.environ:
        yield
        return
    with log_sink(sys.stderr) as path:
        wanted = resolved_format(settings.telemetry.log_format, sys.stderr)
        os.environ |= {SINK_VARIABLE: path, FORMAT_VARIABLE: wanted}
        yield


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of ending the process."""
    stopped = threading.Event()
    previous = _listen(stopped)
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _listen(stopped: threading.Event) -> dict[signal.Signals, Any]:
    """Let signals set `stopped`; returns what they did before."""

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
