"""The life of a local service: start Ray, deploy, wait until ready, serve, drain, stop."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import httpx
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from stepserve import __version__
from stepserve.config import ConfigError, Settings
from stepserve.domain.errors import StepserveError
from stepserve.models.catalogue import ModelNotFoundError, model_folder
from stepserve.ray_serve.application import ingress_target, model_target, needed_cpus
from stepserve.ray_serve.applications import (
    INGRESS_APPLICATION,
    MODEL_PREFIX,
    applications,
    model_application,
    model_handle,
)
from stepserve.ray_serve.exposure import check_exposure
from stepserve.ray_serve.listen_socket import held_listen_socket
from stepserve.ray_serve.local.draining import drain
from stepserve.ray_serve.local.failed_models import failed_models, failure_of
from stepserve.ray_serve.local.local_ray import (
    job_config,
    joined_address,
    never_start_unasked,
    set_defaults,
    start_local_ray,
)
from stepserve.ray_serve.local.runtime_folder import RuntimeFolder, runtime_folder
from stepserve.telemetry.log_sink import log_sink
from stepserve.telemetry.logs import FORMAT_VARIABLE, SINK_VARIABLE, resolved_format

READY_TIMEOUT_S = 600.0
READY_POLL_S = 0.25
# Before there is an ingress, connections wait for one.
READY_RESPONSE_S = 2.0
# Programs that start this one may hand on a signal that it got as well.
ONE_WISH_S = 1.0
# At SIGHUP the file may still be written to.
LOOK_AGAIN_S = 0.5
MOST_LOOKS = 5
# Logical ones: updates start new replicas before the old ones end, and models are added.
ROOM_FOR_MODELS = 4
logger = logging.getLogger(__name__)

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - to be replaced, not bound

Tell = Callable[[str], None]


class StartError(StepserveError):
    """The service did not become ready; the message says why."""


def base_url(settings: Settings) -> str:
    """Where this machine reaches the service."""
    host = ANY_ADDRESS.get(settings.http.host, settings.http.host)
    in_url = f"[{host}]" if ":" in host else host
    return f"http://{in_url}:{settings.http.port}"


def serve_until_stopped(
    settings: Settings,
    when_ready: Callable[[str], None],
    tell: Tell,
    read_settings: Callable[[], Settings],
) -> None:
    """Serve until SIGINT or SIGTERM, then drain and return.

    Args:
        settings: what to serve, and where.
        when_ready: called once with the base URL; the service keeps serving meanwhile.
        tell: called with each line that the operator should read.
        read_settings: called at SIGHUP for the models to serve from then on.

    Raises:
        ModelNotFoundError: no configured model exists.
        OpenToAllError: other machines could use it without an API key, and nobody said they may.
        KeysUnreadableError: the API keys are not written as they should be.
        StoreUnusableError: results cannot be kept where the settings say.
        AddressTakenError: the service cannot listen at its address.
        NotPrivateError: the folder for temporary files is open to others.
        StartError: no model could be loaded, or none was ready in time.
    """
    check_exposure(settings)
    check_folders(settings)
    with (
        _signals() as signals,
        runtime_folder() as folder,
        _listen_path(settings, folder) as listen_path,
        _logs_come_here(settings, folder),
    ):
        ingress = ingress_target(settings, listen_path)
        tell(f"stepserve {__version__}: starting {', '.join(settings.models)} ...")
        try:
            with _ended_by_signals(signals):
                start_ray(settings, folder)
                # Again: Ray has put handlers of its own in place, which end the process on SIGTERM.
                _listen(signals)
                targets = (model_target(model_id, settings) for model_id in settings.models)
                serve.run_many([ingress, *targets], wait_for_applications_running=False)
                if wait_until_ready(settings, signals.stopped, tell):
                    when_ready(base_url(settings))
                    for _ in signals.reloads():
                        settings = _reload(settings, read_settings, tell)
                tell(
                    "stopping: new work is refused, and what is in flight is finished ... "
                    "(once more stops at once)"
                )
                drain(settings, signals.hurried)
        finally:
            stop_ray()


def check_folders(settings: Settings) -> None:
    """Return if any model is where the settings say, on this machine; a hub is not asked.

    Raises:
        ModelNotFoundError: none is.
    """
    errors = []
    for model in settings.models.values():
        if model.revision is not None:
            continue
        try:
            model_folder(model.path)
        except ModelNotFoundError as error:
            errors.append(error)
    if len(errors) == len(settings.models):
        raise errors[0]


def start_ray(settings: Settings, folder: RuntimeFolder) -> None:
    """Start a local Ray, or join the cluster that `RAY_ADDRESS` names."""
    set_defaults({"RAY_USAGE_STATS_ENABLED": "0"})
    never_start_unasked()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging_config = LoggingConfig(enable_access_log=False)
    if address := joined_address():
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, job_config=job_config())
        http = HTTPOptions(host=settings.http.host, port=settings.http.port)
        serve.start(http_options=http, logging_config=logging_config)
    else:
        start_local_ray(math.ceil(2 * needed_cpus(settings) + ROOM_FOR_MODELS), folder)
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=logging_config)


def apply_models(old: Settings, new: Settings, tell: Tell) -> Settings:
    """Add, update and remove models; those that stay as they are notice nothing.

    One that stays as it is and could not be loaded is tried again, in new processes.

    Running requests of a model that is updated or removed get its `drain_s` to finish. Returns what
    is in effect: everything but the models stays as it was.
    """
    in_effect = old.model_copy(update={"models": new.models})
    changed = [m for m, settings in new.models.items() if old.models.get(m) != settings]
    failed = failed_models([model_id for model_id in new.models if model_id not in changed])
    if changed or failed:
        targets = [model_target(model_id, in_effect) for model_id in (*changed, *failed)]
        serve.run_many(targets, wait_for_applications_running=False)
    removed = [model_id for model_id in old.models if model_id not in new.models]
    for model_id in removed:
        serve.delete(model_application(model_id), _blocking=False)
    added = [model_id for model_id in changed if model_id not in old.models]
    updated = [model_id for model_id in changed if model_id in old.models]
    done = {"added": added, "updated": updated, "removed": removed, "tried again": failed}
    for what in _what_changed(done, old, new):
        tell(what)
    return in_effect


def _what_changed(done: Mapping[str, Sequence[str]], old: Settings, new: Settings) -> list[str]:
    """One line for each kind of change: models by what was done, then what was left."""
    told = [f"{what}: {', '.join(models)}" for what, models in done.items() if models]
    others = [name for name in type(old).model_fields if name != "models"]
    kept = [name for name in others if getattr(old, name) != getattr(new, name)]
    if kept:
        told.append(f"not applied before a restart: {', '.join(kept)}")
    if old.default_model not in new.models:
        told.append(
            f"requests that name no model are refused before a restart: {old.default_model} "
            "is removed, which they were for"
        )
    return told or ["nothing has changed since the settings were last read"]


def wait_until_ready(settings: Settings, stopped: threading.Event, tell: Tell) -> bool:
    """Wait until every model is loaded or has failed, and HTTP tells so; False if `stopped` is set.

    Tells which models failed, and why.

    Raises:
        StartError: all of them failed, or it took too long.
    """
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    starting = Starting(settings.models)
    url = base_url(settings)
    with httpx.Client(base_url=url, timeout=READY_RESPONSE_S, trust_env=False) as client:
        while not stopped.wait(READY_POLL_S):
            failures = starting.failures()
            if len(failures) == len(settings.models):
                raise StartError("\n".join(failures.values()))
            if _ready_models(client) | failures.keys() >= settings.models.keys():
                break
            if time.monotonic() > deadline_s:
                raise StartError(f"the service was not ready within {READY_TIMEOUT_S:.0f} s")
    for line in starting.failures().values():
        tell(line)
    return not stopped.is_set()


class Starting:
    """Which of the models that were just deployed cannot be loaded, or the ingress started."""

    def __init__(self, model_ids: Iterable[str]) -> None:
        self._replies = {model_id: model_handle(model_id).status.remote() for model_id in model_ids}
        self._failures: dict[str, str] = {}

    def failures(self) -> dict[str, str]:
        """Those known by now: what to say of each model.

        Raises:
            StartError: there is no ingress.
        """
        found = applications()
        ingress = found.get(INGRESS_APPLICATION)
        if ingress is not None and (failure := failure_of(ingress)):
            raise StartError(f"the ingress {failure}")
        for model_id in list(self._replies):
            application = found.get(model_application(model_id))
            failure = failure_of(application) or self._told(model_id)
            if failure:
                self._failures[model_id] = f"model {model_id} {failure}"
        return self._failures

    def _told(self, model_id: str) -> str:
        """Why it cannot be loaded, if a replica says so; it is not asked again."""
        try:
            status = self._replies[model_id].result(timeout_s=0.001)
        except TimeoutError:
            return ""
        except (RayError, RayServeException):
            self._replies[model_id] = model_handle(model_id).status.remote()
            return ""
        del self._replies[model_id]
        return "" if status.ready else status.detail


def stop_ray() -> None:
    """Take the application off a cluster that was joined, and leave Ray or end the local one."""
    if joined_address() and ray.is_initialized():
        for name in applications():
            if name == INGRESS_APPLICATION or name.startswith(MODEL_PREFIX):
                serve.delete(name)
    # Its threads would complain that Ray is not there any more.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    ray.shutdown()


def _ready_models(client: httpx.Client) -> set[str]:
    """The models that are ready as far as HTTP tells by now."""
    try:
        return set(client.get("/readyz").json().get("models", ()))
    except (httpx.TransportError, ValueError):
        return set()


class _Signals:
    """What the operator wants: `hurried` that nothing more is waited for, asked for twice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stopped = threading.Event()
        self.hurried = threading.Event()
        self._clock = clock
        self._stopped_s = 0.0
        self._reload = threading.Event()
        self._any = threading.Event()

    def hear(self, number: int, frame: FrameType | None) -> None:
        """In place of what signals usually do."""
        if number == signal.SIGHUP:
            self._reload.set()
        elif not self.stopped.is_set():
            self._stopped_s = self._clock()
            self.stopped.set()
        elif self._clock() - self._stopped_s > ONE_WISH_S:
            self.hurried.set()
        self._any.set()

    def reloads(self) -> Iterator[None]:
        """Yields whenever the settings are to be read again, and ends when it is time to stop."""
        while not self.stopped.is_set():
            self._any.wait()
            self._any.clear()
            if self._reload.is_set() and not self.stopped.is_set():
                self._reload.clear()
                yield


@contextmanager
def _ended_by_signals(signals: _Signals) -> Iterator[None]:
    """What fails because the operator wants an end is no failure.

    Ctrl-C in a terminal reaches Ray's processes as well, which then fail to start in many ways.
    While Ray starts, a handler of its own answers SIGTERM with `SystemExit`.
    """
    try:
        yield
    except SystemExit:
        signals.stopped.set()
    except Exception as error:
        if not signals.stopped.is_set():
            raise
        logger.info("ended by a signal: %r", error)


def _reload(
    settings: Settings,
    read_settings: Callable[[], Settings],
    tell: Tell,
    pause: Callable[[float], None] = time.sleep,
) -> Settings:
    try:
        return apply_models(settings, _settled(read_settings, pause), tell)
    except Exception as error:
        # Ray refuses some values with errors of many kinds, and what is served must go on.
        tell(f"nothing is changed: {error}")
        return settings


def _settled(read_settings: Callable[[], Settings], pause: Callable[[float], None]) -> Settings:
    """The settings once two looks at them agree: their file may be in the middle of being written.

    Raises what `read_settings` raises at the last of several looks.
    """
    before: Settings | None = None
    for _ in range(MOST_LOOKS - 1):
        try:
            settings = read_settings()
        except ConfigError:
            before = None
        else:
            if settings == before:
                return settings
            before = settings
        pause(LOOK_AGAIN_S)
    return read_settings()


@contextmanager
def _listen_path(settings: Settings, folder: RuntimeFolder) -> Iterator[str | None]:
    """Where the ingress borrows its listening socket; None if Ray Serve's proxies are to listen."""
    with held_listen_socket(settings.http.host, settings.http.port, folder.path) as listen_path:
        if not joined_address():
            yield listen_path
            return
    # The address was free. Ray would share it with another service of ours, unasked.
    yield None


@contextmanager
def _logs_come_here(settings: Settings, folder: RuntimeFolder) -> Iterator[None]:
    """Let the processes of a local service log to this one's stderr."""
    if joined_address():
        yield
        return
    with log_sink(sys.stderr, folder.path) as path:
        wanted = resolved_format(settings.telemetry.log_format, sys.stderr)
        os.environ |= {SINK_VARIABLE: path, FORMAT_VARIABLE: wanted}
        yield


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Signals as events, in place of ending the process."""
    signals = _Signals()
    previous = _listen(signals)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _listen(signals: _Signals) -> dict[signal.Signals, Any]:
    """Let signals be heard; returns what they did before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {number: signal.signal(number, signals.hear) for number in numbers}
