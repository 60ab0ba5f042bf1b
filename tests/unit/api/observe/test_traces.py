"""Exchanges as spans: W3C trace context in and out, and on to whoever makes the images."""

from __future__ import annotations

import httpx
from api_fakes import SETTINGS, FakeBackend, make_store
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id
from stepserve.api import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import KeyRing
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.exchange_context import Exchange
from stepserve.api.observe.exchanges import Observation
from stepserve.telemetry.tracing import HttpTraces

GENERATIONS = "/v1/images/generations"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    def __init__(self) -> None:
        self.backend, self.exchanges = FakeBackend(), list[Exchange]()
        self.exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        observation = Observation((self.exchanges.append,), None, HttpTraces(provider))
        access = Access(KeyRing(()), LocalUsage(lambda: 0.0))
        app = create_app(self.backend, SETTINGS, make_store(), access, observation)
        transport = httpx.ASGITransport(app=app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_a_request_goes_on_with_the_trace_it_came_with() -> None:
    traced = Traced()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "mine"}
    response = await traced.client.post(GENERATIONS, json={"prompt": "cat"}, headers=headers)

    (span,) = traced.exporter.get_finished_spans()
    assert span.name == f"POST {GENERATIONS}"
    assert format_span_id(span.parent.span_id) == PARENT
    assert span.attributes["stepserve.request_id"] == "mine"
    assert span.attributes["http.response.status_code"] == 200
    below = f"00-{TRACE}-{format_span_id(span.context.span_id)}-01"
    assert response.headers["traceparent"] == below
    assert dict(traced.backend.requests[-1].trace_context)["traceparent"] == below
    assert traced.exchanges[-1].trace_id == TRACE


async def test_a_trace_begins_where_there_was_none() -> None:
    traced = Traced()
    response = await traced.client.post(GENERATIONS, json={"prompt": ""})
    (span,) = traced.exporter.get_finished_spans()
    assert response.status_code == span.attributes["http.response.status_code"] == 400
    trace_id = format_trace_id(span.context.trace_id)
    assert trace_id in response.headers["traceparent"]
    assert traced.exchanges[-1].trace_id == trace_id


async def test_probes_and_open_pages_are_not_traced() -> None:
    traced = Traced()
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models/emoji/batch"):
        response = await traced.client.get(path)
        assert "traceparent" not in response.headers
    assert traced.exporter.get_finished_spans() == ()
