"""The spans of requests that share forwards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id
from stepserve.domain.errors import CancelledError, ServerFullError
from stepserve.domain.events import Accepted, Failed, Finished
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings
from stepserve.telemetry.request_traces import MOST_SPANS, RequestTraces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
EPOCH_S = 1000.0


class Traced:
    """A replica's traces with a clock of its own, and the spans that came of them."""

    def __init__(self, **options: object) -> None:
        self.now_s = 0.0
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(**options)  # type: ignore[arg-type]
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.traces = RequestTraces(
            provider,
            {"stepserve.replica": "r1"},
            clock=lambda: self.now_s,
            wall_clock=lambda: EPOCH_S,
        )

    def begin(self, name: str, context: tuple[tuple[str, str], ...] = ()) -> None:
        request = GenerationRequest(
            name, "emoji", "a secret wish", 64, 64, 20, 4.0, 0, "ddim", trace_context=context
        )
        self.traces.begin(request)
        self.traces.add_event(RequestKey(name), Accepted(name, 0, 1.0))

    def forward(self, *names: str, stage: str = "denoise", module: str = "unet.forward") -> None:
        self.now_s += 1.0
        requests = tuple((RequestKey(name), 2) for name in names)
        rows = 2 * len(names)
        self.traces.forward_ended(
            ForwardReport(1, stage, module, requests, rows, 0, 16, 1.0, None, self.now_s)
        )

    def finish(self, name: str, total_s: float, queue_s: float = 0.5) -> None:
        timings = Timings(queue_s=queue_s, total_s=total_s, batch_share=0.5)
        self.traces.request_ended(
            EndReport(RequestKey(name), RequestState.FINISHED, timings, 1, 0, False, self.now_s)
        )
        self.now_s += 0.25
        self.traces.add_event(RequestKey(name), Finished(name, (), timings))

    def spans(self, name: str) -> list[ReadableSpan]:
        self.traces.flush()
        found = [span for span in self.exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time or 0)


def seconds(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9 - EPOCH_S, span.end_time / 1e9 - EPOCH_S


def steps(spans: Sequence[ReadableSpan]) -> list[tuple[object, object, int]]:
    shown = [(span.attributes or {}, len(span.links)) for span in spans]
    return [(a["stepserve.first_step"], a["stepserve.steps"], links) for a, links in shown]


@pytest.fixture
def traced() -> Traced:
    return Traced()


def test_a_request_has_a_span_for_each_part_of_its_life(traced: Traced) -> None:
    traced.begin("a", TRACEPARENT)
    traced.forward("a", stage="encode", module="text_encoder.forward")
    traced.forward("a", stage="encode", module="vae.encode")
    for _ in range(3):
        traced.forward("a")
    traced.forward("a", stage="decode", module="vae.decode")
    traced.finish("a", total_s=6.0)

    (root,) = traced.spans("generate")
    assert root.parent is not None
    assert format_span_id(root.parent.span_id) == PARENT
    assert format_trace_id(root.context.trace_id) == TRACE
    assert root.attributes is not None
    assert root.attributes["stepserve.outcome"] == "finished"
    assert root.attributes["stepserve.replica"] == "r1"
    assert "a secret wish" not in str(root.attributes)
    expected = {
        "queue": (0.0, 0.5),
        "text encoding": (0.0, 1.0),
        "input encoding": (1.0, 2.0),
        "denoising": (2.0, 5.0),
        "decoding": (5.0, 6.0),
        "image encoding": (6.0, 6.25),
    }
    for name, times in expected.items():
        (child,) = traced.spans(name)
        assert child.parent is not None
        assert child.parent.span_id == root.context.span_id, name
        assert seconds(child) == pytest.approx(times), name
    assert seconds(root) == pytest.approx((0.0, 6.25))


def test_denoising_is_grouped_by_who_shares_it_and_linked_to_them(traced: Traced) -> None:
    traced.begin("a")
    traced.begin("b")
    for names in (("a",), ("a",), ("a", "b"), ("a", "b"), ("a", "b"), ("a",)):
        traced.forward(*names)
    traced.finish("b", total_s=6.0)
    traced.finish("a", total_s=6.0)

    roots = {s.attributes["stepserve.request_id"]: s for s in traced.spans("generate")}
    spans = traced.spans("denoising")
    mine = [s for s in spans if s.parent.span_id == roots["a"].context.span_id]
    theirs = [s for s in spans if s.parent.span_id == roots["b"].context.span_id]
    assert steps(mine) == [(1, 2, 0), (3, 3, 1), (6, 1, 0)]
    assert steps(theirs) == [(1, 3, 1)]
    assert mine[1].links[0].context.span_id == roots["b"].context.span_id
    assert theirs[0].links[0].context.span_id == roots["a"].context.span_id
    assert mine[1].attributes["stepserve.rows_per_forward"] == 4


def test_a_controlnet_beside_the_denoiser_adds_time_and_no_steps(traced: Traced) -> None:
    traced.begin("a")
    for _ in range(2):
        traced.forward("a", stage="control", module="controlnet.forward")
        traced.forward("a")
    traced.finish("a", total_s=4.0)
    (span,) = traced.spans("denoising")
    assert steps([span]) == [(1, 2, 0)]
    assert seconds(span) == pytest.approx((0.0, 4.0))


def test_a_long_request_whose_batch_keeps_changing_has_a_bounded_number_of_spans(
    traced: Traced,
) -> None:
    traced.begin("a")
    for index in range(1000):
        traced.begin(f"b{index}")
        traced.forward("a", f"b{index}")
    traced.finish("a", total_s=1000.0)
    (root,) = [s for s in traced.spans("generate") if s.attributes["stepserve.request_id"] == "a"]
    mine = [s for s in traced.spans("denoising") if s.parent.span_id == root.context.span_id]
    assert len(mine) == MOST_SPANS
    steps = [int(str(s.attributes["stepserve.steps"])) for s in mine]
    assert sum(steps) == 1000


def test_the_last_event_may_come_before_the_report_of_the_end(traced: Traced) -> None:
    traced.begin("a")
    traced.forward("a")
    timings = Timings(total_s=1.0)
    traced.traces.add_event(RequestKey("a"), Finished("a", (), timings))
    assert traced.spans("generate") == []
    traced.traces.request_ended(
        EndReport(RequestKey("a"), RequestState.FINISHED, timings, 1, 0, False, traced.now_s)
    )
    assert len(traced.spans("generate")) == 1
    assert len(traced.spans("queue")) == 1


def test_refused_and_cancelled_requests_end_with_an_error(traced: Traced) -> None:
    request = GenerationRequest("no", "emoji", "cat", 64, 64, 20, 4.0, 0, "ddim")
    traced.traces.begin(request)
    traced.traces.add_event(RequestKey("no"), Failed("no", ServerFullError("full", 1.0)))
    traced.begin("gone")
    traced.forward("gone")
    traced.traces.request_ended(
        EndReport(
            RequestKey("gone"), RequestState.CANCELLED, Timings(total_s=1.0), 1, 19, False, 1.0
        )
    )
    traced.traces.add_event(
        RequestKey("gone"), Failed("gone", CancelledError("request gone was cancelled"))
    )

    roots = {s.attributes["stepserve.request_id"]: s for s in traced.spans("generate")}
    assert roots["no"].attributes["stepserve.outcome"] == "ServerFullError"
    assert roots["gone"].attributes["stepserve.outcome"] == "CancelledError"
    assert {s.status.status_code for s in roots.values()} == {StatusCode.ERROR}
    assert traced.spans("image encoding") == []


def test_what_was_not_sampled_leaves_no_span(traced: Traced) -> None:
    sampled = Traced(sampler=ParentBased(TraceIdRatioBased(0.0)))
    sampled.begin("quiet")
    sampled.begin("asked", TRACEPARENT)
    sampled.forward("quiet", "asked")
    sampled.finish("quiet", total_s=1.0)
    sampled.finish("asked", total_s=1.0)
    (root,) = sampled.spans("generate")
    assert root.attributes["stepserve.request_id"] == "asked"
    assert steps(sampled.spans("denoising")) == [(1, 1, 0)]


def test_closing_ends_what_is_open(traced: Traced) -> None:
    traced.begin("a")
    traced.forward("a")
    traced.traces.close()
    assert len(traced.spans("generate")) == 1
    assert steps(traced.spans("denoising")) == [(1, 1, 0)]


def test_two_owners_with_one_id_have_a_span_each(traced: Traced) -> None:
    for owner in ("alice", "bob"):
        request = GenerationRequest(
            "order", "emoji", "cat", 64, 64, 20, 4.0, 0, "ddim", owner=owner
        )
        traced.traces.begin(request)
    traced.traces.add_event(RequestKey("order", "bob"), Failed("order", CancelledError("gone")))
    traced.traces.add_event(
        RequestKey("order", "alice"), Failed("order", ServerFullError("full", 1.0))
    )

    outcomes = [s.attributes["stepserve.outcome"] for s in traced.spans("generate")]
    assert sorted(map(str, outcomes)) == ["CancelledError", "ServerFullError"]
