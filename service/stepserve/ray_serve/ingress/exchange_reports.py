"""What the ingress reports of the exchanges it serves: metrics, spans, and a log line each."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from stepserve import __version__
from stepserve.api.exchange_context import Exchange
from stepserve.api.observe.access_log import AccessLog
from stepserve.api.observe.exchanges import Observation
from stepserve.config import TelemetrySettings
from stepserve.ray_serve.ingress.node_metrics import read_metrics
from stepserve.ray_serve.ray_instruments import RayInstruments
from stepserve.telemetry import catalogue
from stepserve.telemetry.flusher import Flusher
from stepserve.telemetry.instruments import Instruments
from stepserve.telemetry.logs import set_up_logging
from stepserve.telemetry.tracing import HttpTraces, open_traces


def observe(settings: TelemetrySettings) -> Observation:
    """Begin to observe, in an ingress replica."""
    set_up_logging(settings.log_format, settings.log_level)
    instruments = RayInstruments()
    labels = {"version": __version__, "process": "ingress"}
    Flusher(lambda: instruments.set(catalogue.BUILD, 1, labels)).start()
    listeners = (partial(_record, instruments), AccessLog(settings.log_prompts))
    provider = open_traces(f"ingress-{os.getpid()}")
    traces = None if provider is None else HttpTraces(provider)
    return Observation(listeners, read_metrics if settings.metrics else None, traces)


def count_retries() -> Callable[[str], None]:
    """What to call with a model's id when a request of it goes to another replica."""
    instruments = RayInstruments()
    return lambda model: instruments.count(catalogue.REQUEST_RETRIES, 1, {"model": model})


def _record(instruments: Instruments, exchange: Exchange) -> None:
    """Record an exchange: a few microseconds, so it needs no thread of its own."""
    notes = exchange.notes
    labels = {"route": exchange.route, "model": notes.model}
    result = {"status": str(exchange.status), "outcome": exchange.outcome}
    instruments.count(catalogue.HTTP_REQUESTS, 1, labels | result)
    instruments.observe(catalogue.HTTP_SECONDS, exchange.duration_s, labels)
    # Probes of a model that loads are refused nothing.
    if exchange.asks_for_work:
        for code in [notes.error_code] if notes.is_refusal else notes.refusals:
            reason = {"model": notes.model, "reason": code}
            instruments.count(catalogue.REFUSALS, 1, reason)
