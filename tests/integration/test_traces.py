"""Traces of a real service, at a real OTLP receiver."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hearing import all_hear_of_the_end
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from otlp_receiver import Received, over_grpc, over_http
from running_service import QUICKLY_LOADED, Service
from stepserve.telemetry.tracing import HttpTraces, open_traces

GENERATIONS = "/v1/images/generations"
STEPS = 40
PROMPT = "a very secret wish"
LOG_PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def received() -> Iterator[Received]:
    with over_http() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced(received: Received, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": received.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    folder, engine = tmp_path_factory.mktemp("traced"), QUICKLY_LOADED | {"drain_s": 1}
    running = Service(folder, variables=variables, engine=engine)
    running.start()
    yield running
    running.kill()


def draw(service: Service, number: int) -> tuple[str, httpx.Response]:
    trace_id = os.urandom(16).hex()
    headers = {"traceparent": f"00-{trace_id}-{os.urandom(8).hex()}-01"}
    body = {"prompt": f"{PROMPT} {number}", "num_inference_steps": STEPS, "seed": number}
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
        return trace_id, client.post(GENERATIONS, json=body, headers=headers)


def attributes(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def is_whole(spans: list[Span]) -> bool:
    return {"generate", f"POST {GENERATIONS}"} <= {span.name for span in spans}


def test_requests_that_shared_forwards_are_traced_and_linked(
    traced: Service, received: Received
) -> None:
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda number: draw(traced, number), range(3)))
    roots: dict[str, Span] = {}
    for trace_id, response in responses:
        assert response.status_code == 200, response.text
        spans = received.wait_for(trace_id, is_whole)
        by_name = {span.name: span for span in spans}
        exchange, roots[trace_id] = by_name[f"POST {GENERATIONS}"], by_name["generate"]
        assert response.headers["traceparent"].split("-")[1:3] == [trace_id, exchange.span_id.hex()]
        assert roots[trace_id].parent_span_id == exchange.span_id
        children = [s for s in spans if s.parent_span_id == roots[trace_id].span_id]
        count = Counter(span.name for span in children)
        assert count["queue"] == count["decoding"] == count["image encoding"] == 1
        assert count["text encoding"] >= 1
        steps = [attributes(s)["stepserve.steps"] for s in children if s.name == "denoising"]
        assert sum(map(int, map(str, steps))) == STEPS
        assert all(exchange.start_time_unix_nano <= s.start_time_unix_nano for s in children)
        assert all(s.end_time_unix_nano <= exchange.end_time_unix_nano for s in children)
        assert PROMPT not in str(spans)
    assert received.services == {"stepserve"}
    linked = {
        link.span_id for trace_id in roots for s in received.spans(trace_id) for link in s.links
    }
    assert linked <= {root.span_id for root in roots.values()}
    assert linked, "requests at once shared no forward"


def test_log_lines_name_the_trace(traced: Service) -> None:
    trace_id, response = draw(traced, 9)
    assert response.status_code == 200
    # Lines of other processes arrive a little later than their answers.
    deadline_s = time.monotonic() + LOG_PATIENCE_S
    while f'"trace_id": "{trace_id}"' not in traced.log:
        assert time.monotonic() < deadline_s, traced.log
        time.sleep(0.1)


def test_who_is_cut_off_is_answered_although_spans_cannot_be_sent(
    traced: Service, received: Received
) -> None:
    """Whoever collects spans accepts connections, and says nothing any more."""
    received.falls_silent()
    draw(traced, 10)
    all_hear_of_the_end(traced, 1, traced.stop)


def test_spans_go_over_grpc_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with over_grpc() as receiver:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        provider = open_traces("here")
        assert provider is not None
        span = HttpTraces(provider).begin({}, "GET")
        span.end("GET /v1/models", 200, {})
        provider.shutdown()
        assert [sent.name for sent in receiver.spans(span.trace_id)] == ["GET /v1/models"]
