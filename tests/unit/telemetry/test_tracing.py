"""Where spans go, and the spans of HTTP exchanges."""

from __future__ import annotations

import logging

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id
from stepserve.telemetry.tracing import (
    HttpTraces,
    TraceOptions,
    TraceSettingsError,
    open_traces,
    trace_options,
)

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("environ", "options"),
    [
        ({}, TraceOptions()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, TraceOptions()),
        (ENDPOINT, TraceOptions(("otlp",))),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/t"}, TraceOptions(("otlp",))),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "TRUE"}, TraceOptions()),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, TraceOptions()),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, TraceOptions(("console", "otlp"))),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, TraceOptions(("otlp",), "grpc")),
        (
            ENDPOINT
            | {
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            TraceOptions(("otlp",)),
        ),
    ],
)
def test_the_usual_variables_decide(environ: dict[str, str], options: TraceOptions) -> None:
    assert trace_options(environ) == options


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
)
def test_what_is_not_known_is_named_and_stops_no_service(
    name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TraceSettingsError, match=f"{name} is '{value}'; it must be one of"):
        trace_options(ENDPOINT | {name: value})
    with caplog.at_level(logging.ERROR):
        assert open_traces("here", ENDPOINT | {name: value}) is None
    assert "nothing is traced" in caplog.text


def test_spans_tell_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = open_traces("replica-1", {"OTEL_TRACES_EXPORTER": "console"})
    assert provider is not None
    attributes = provider.resource.attributes
    assert (attributes["service.name"], attributes["service.instance.id"]) == (
        "stepserve",
        "replica-1",
    )
    provider.shutdown()

    monkeypatch.setenv("OTEL_SERVICE_NAME", "images")
    provider = open_traces("replica-1", {"OTEL_TRACES_EXPORTER": "console"})
    assert provider is not None
    assert provider.resource.attributes["service.name"] == "images"
    provider.shutdown()


def test_a_span_goes_on_with_the_trace_of_its_caller() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    span = HttpTraces(provider).begin(headers, "POST")
    span.end("POST /v1/x", 503, {"stepserve.model": "emoji", "stepserve.caller": ""})

    (span_sent,) = exporter.get_finished_spans()
    assert (span_sent.name, span_sent.kind) == ("POST /v1/x", SpanKind.SERVER)
    assert span_sent.parent is not None
    assert format_span_id(span_sent.parent.span_id) == PARENT
    assert format_trace_id(span_sent.context.trace_id) == span.trace_id == TRACE
    assert span_sent.status.status_code is StatusCode.ERROR
    assert dict(span_sent.attributes or {}) == {
        "http.response.status_code": 503,
        "stepserve.model": "emoji",
    }
    carried = dict(span.carrier)
    assert carried["traceparent"] == f"00-{TRACE}-{format_span_id(span_sent.context.span_id)}-01"
    assert carried["tracestate"] == "vendor=1"


def test_what_is_not_sampled_says_so_to_others() -> None:
    span = HttpTraces(TracerProvider(sampler=ALWAYS_OFF)).begin({}, "GET")
    span.end("GET /", 200, {})
    flags = dict(span.carrier)["traceparent"].rsplit("-", 1)[1]
    assert int(flags, 16) & 1 == 0
