"""Traces: where spans go, as the usual `OTEL_` variables say, and spans of HTTP exchanges.

Nothing is traced unless an exporter or the address of a collector is named:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/. Sampling,
batching, headers, certificates and attributes of the resource are read by OpenTelemetry's own code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.resources import (
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    format_trace_id,
    get_current_span,
)
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stepserve import __version__

logger = logging.getLogger(__name__)

TraceContext = tuple[tuple[str, str], ...]
"""Headers that name the parent span: W3C's `traceparent` and `tracestate`."""

NAME, TRACEPARENT = "stepserve", "traceparent"
OTLP, CONSOLE, NONE = "otlp", "console", "none"
HTTP, GRPC = "http/protobuf", "grpc"
SERVER_ERROR = 500

_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True)
class TraceOptions:
    """Where spans go: `exporters` are none where nothing is traced."""

    exporters: tuple[str, ...] = ()
    protocol: str = HTTP


class TraceSettingsError(ValueError):
    """An `OTEL_` variable has a value that cannot be used here."""


def trace_options(environ: Mapping[str, str]) -> TraceOptions:
    """What the environment says.

    Raises:
        TraceSettingsError: a variable names an exporter or a protocol that is not known here.
    """
    # The standard has empty variables mean the same as missing ones.
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    if given.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return TraceOptions()
    # A collector's address alone is enough: nobody names one in order to send nothing.
    has_address = bool(
        {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & given.keys()
    )
    named = given.get("OTEL_TRACES_EXPORTER", OTLP if has_address else NONE)
    exporters = tuple(name.strip() for name in named.split(","))
    _check("OTEL_TRACES_EXPORTER", exporters, (OTLP, CONSOLE, NONE))
    variable = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    if variable not in given:
        variable = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = given.get(variable, HTTP)
    _check(variable, (protocol,), (HTTP, GRPC))
    return TraceOptions(tuple(name for name in exporters if name != NONE), protocol)


def open_traces(instance: str, environ: Mapping[str, str] | None = None) -> TracerProvider | None:
    """Make what spans of this process go through; None if there is nowhere to send them.

    Args:
        instance: name of this process among those of the service.
    """
    try:
        options = trace_options(os.environ if environ is None else environ)
    except TraceSettingsError as error:
        logger.error("nothing is traced: %s", error)
        return None
    if not options.exporters:
        return None
    provider = TracerProvider(resource=_resource(instance))
    for name in options.exporters:
        provider.add_span_processor(BatchSpanProcessor(_exporter(name, options.protocol)))
    return provider


def carried_context(carrier: TraceContext | Mapping[str, str]) -> Context:
    """What the headers of a request say of the trace that it belongs to."""
    return _propagator.extract(dict(carrier), context=Context())


def trace_id_in(headers: Mapping[str, str]) -> str:
    """The trace that a request belongs to, by its W3C `traceparent`; empty if there is none."""
    context = get_current_span(carried_context(headers)).get_span_context()
    return format_trace_id(context.trace_id) if context.is_valid else ""


def carrier_of(span: Span) -> TraceContext:
    """The headers that make `span` the parent of spans in other processes."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context=set_span_in_context(span))
    return tuple(carrier.items())


class HttpTraces:
    """Begins a span for each HTTP exchange.

    Args:
        provider: where spans go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer(NAME, __version__)

    def begin(self, headers: Mapping[str, str], method: str) -> HttpSpan:
        """Begin the span of an exchange with these headers, whose names are in lower case."""
        span = self._tracer.start_span(
            method, context=carried_context(headers), kind=SpanKind.SERVER
        )
        return HttpSpan(span)


class HttpSpan:
    """The span of one HTTP exchange."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.trace_id = format_trace_id(span.get_span_context().trace_id)
        self.carrier = carrier_of(span)
        self.traceparent = dict(self.carrier)[TRACEPARENT]

    def end(self, name: str, status: int, attributes: Mapping[str, str | int]) -> None:
        """The exchange is over. `name` is its method and the template of its route."""
        self._span.update_name(name)
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attributes({key: value for key, value in attributes.items() if value != ""})
        if status >= SERVER_ERROR:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def _check(variable: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise TraceSettingsError(
                f"{variable} is {value!r}; it must be one of {', '.join(known)}"
            )


def _resource(instance: str) -> Resource:
    """Who made the spans; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    ours = {SERVICE_NAME: NAME, SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: instance}
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})


def _exporter(name: str, protocol: str) -> SpanExporter:
    """Exporters are imported when they are wanted: gRPC takes a while."""
    if name == CONSOLE:
        return ConsoleSpanExporter()
    if protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

        return over_grpc.OTLPSpanExporter()
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

    return over_http.OTLPSpanExporter()
