"""The spans of one replica's requests, made from its engine's reports and from their events.

One span for each request, below the span that its trace context names, with children for its wait,
its encoding, its denoising, its decoding and its files. Denoising forwards in a row that the same
requests shared are one span, linked to the spans of the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, Span, Status, StatusCode
from opentelemetry.trace.propagation import set_span_in_context

from stepserve import __version__
from stepserve.domain.events import Accepted, Event, Failed, Finished
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.telemetry.engine_metrics import DENOISE
from stepserve.telemetry.tracing import NAME, carried_context

MOST_SPANS = 32
"""Most denoising spans of one request: where others join and leave more often, the last is long."""

DENOISING = (DENOISE, "control")
TEXT_ENCODER = "text_encoder"

Attributes = Mapping[str, str | int | float]
Shared = tuple[ForwardReport, dict[RequestKey, Span]]
"""A forward, and the spans of the traced requests that shared it."""


@dataclass
class TracedRequest:
    """The span of a request, and what was reported of it so far."""

    span: Span
    forwards: list[Shared] = field(default_factory=list)
    is_accepted: bool = False
    end: EndReport | None = None
    outcome: Finished | Failed | None = None
    outcome_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: of a refused request the engine reports no end."""
        return self.outcome is not None and (self.end is not None or not self.is_accepted)


class RequestTraces:
    """An engine's observer, and a listener to the events of requests.

    All methods but `flush` and `close` only append to a list, whatever thread they are called on;
    `flush` makes the spans.

    Args:
        provider: where spans go.
        attributes: of the span of every request.
        clock: the engine's.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        provider: TracerProvider,
        attributes: Attributes,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tracer = provider.get_tracer(NAME, __version__)
        self._provider = provider
        self._attributes = attributes
        self._clock = clock
        self._epoch_s = wall_clock() - clock()
        # Appending and popping at the ends is safe between threads.
        self._pending: deque[Callable[[], None]] = deque()
        # Those in flight; touched by `flush` alone, but for the question whether there are any.
        self._requests: dict[RequestKey, TracedRequest] = {}

    def begin(self, request: GenerationRequest) -> None:
        """A request is about to be handed to the engine."""
        span = self._tracer.start_span(
            "generate",
            context=carried_context(request.trace_context),
            attributes=_attributes_of(request) | dict(self._attributes),
            start_time=self._ns(self._clock()),
        )
        if span.is_recording():
            traced = TracedRequest(span)
            self._pending.append(partial(self._requests.__setitem__, request.key, traced))

    def add_event(self, key: RequestKey, event: Event) -> None:
        """Something happened to a request; see `domain.events`."""
        match event:
            case Accepted():
                self._pending.append(partial(self._accepted, key))
            case Finished() | Failed():
                self._pending.append(partial(self._outcome, key, event, self._clock()))

    def forward_ended(self, report: ForwardReport) -> None:
        """A forward succeeded."""
        if self._requests or self._pending:
            self._pending.append(partial(self._forward, report))

    def request_ended(self, report: EndReport) -> None:
        """A request ended."""
        if self._requests or self._pending:
            self._pending.append(partial(self._request_ended, report))

    def flush(self) -> None:
        """Make spans of what was reported. Off the engine's thread."""
        for _ in range(len(self._pending)):
            self._pending.popleft()()

    def close(self) -> None:
        """End what is still open, and send everything."""
        self.flush()
        now_s = self._clock()
        for traced in self._requests.values():
            self._end(traced, now_s)
        self._requests.clear()
        self._provider.shutdown()

    def _accepted(self, key: RequestKey) -> None:
        if traced := self._requests.get(key):
            traced.is_accepted = True

    def _forward(self, report: ForwardReport) -> None:
        keys = [key for key, _ in report.requests if key in self._requests]
        spans = {key: self._requests[key].span for key in keys}
        for key in keys:
            self._requests[key].forwards.append((report, spans))

    def _request_ended(self, report: EndReport) -> None:
        if traced := self._requests.get(report.key):
            traced.end = report
            self._end_if_over(report.key, traced)

    def _outcome(self, key: RequestKey, event: Finished | Failed, now_s: float) -> None:
        if traced := self._requests.get(key):
            traced.outcome, traced.outcome_s = event, now_s
            self._end_if_over(key, traced)

    def _end_if_over(self, key: RequestKey, traced: TracedRequest) -> None:
        if traced.is_over:
            self._end(traced, traced.outcome_s)
            del self._requests[key]

    def _end(self, traced: TracedRequest, ended_s: float) -> None:
        self._end_stages(traced)
        self._end_denoising(traced)
        if traced.end is not None:
            end = traced.end
            accepted_s = end.ended_s - end.timings.total_s
            self._child(traced, "queue", (accepted_s, accepted_s + end.timings.queue_s))
            if isinstance(traced.outcome, Finished):
                times = (end.ended_s, max(end.ended_s, ended_s))
                self._child(traced, "image encoding", times)
        _set_outcome(traced.span, traced.outcome)
        traced.span.end(self._ns(ended_s))

    def _end_stages(self, traced: TracedRequest) -> None:
        """A span for each forward that is no denoising."""
        for report, _ in traced.forwards:
            if report.stage not in DENOISING:
                attributes: Attributes = {
                    "stepserve.module": report.module,
                    "stepserve.companions": len(report.requests) - 1,
                }
                self._child(traced, _span_name(report), _times(report, report), attributes)

    def _end_denoising(self, traced: TracedRequest) -> None:
        """A span for all denoising forwards in a row that the same requests shared."""
        first_step = 1
        for group in _by_sharing(traced.forwards):
            reports = [report for report, _ in group]
            steps = sum(report.stage == DENOISE for report in reports)
            attributes = {
                "stepserve.first_step": first_step,
                "stepserve.steps": steps,
                "stepserve.companions": len(reports[-1].requests) - 1,
                "stepserve.rows_per_forward": round(mean(report.rows for report in reports), 2),
            }
            others = {k: s for _, spans in group for k, s in spans.items() if s is not traced.span}
            links = [
                Link(span.get_span_context(), {"stepserve.request_id": key.id})
                for key, span in others.items()
            ]
            times = _times(reports[0], reports[-1])
            self._child(traced, "denoising", times, attributes, links)
            first_step += steps

    def _child(
        self,
        traced: TracedRequest,
        name: str,
        times: tuple[float, float],
        attributes: Attributes | None = None,
        links: Sequence[Link] = (),
    ) -> None:
        """A span that is over already. `times` are on the engine's clock."""
        span = self._tracer.start_span(
            name,
            context=set_span_in_context(traced.span),
            start_time=self._ns(times[0]),
            attributes=attributes,
            links=links,
        )
        span.end(self._ns(times[1]))

    def _ns(self, at_s: float) -> int:
        return int((self._epoch_s + at_s) * 1e9)


def _by_sharing(forwards: Sequence[Shared]) -> list[list[Shared]]:
    """Denoising forwards in groups, a new one where others share it, up to MOST_SPANS."""
    groups: list[list[Shared]] = []
    latest: set[RequestKey] = set()
    for report, spans in forwards:
        if report.stage not in DENOISING:
            continue
        sharing = {key for key, _ in report.requests}
        if sharing != latest and len(groups) < MOST_SPANS:
            groups.append([])
        latest = sharing
        groups[-1].append((report, spans))
    return groups


def _times(first: ForwardReport, last: ForwardReport) -> tuple[float, float]:
    return first.ended_s - first.seconds, last.ended_s


def _span_name(report: ForwardReport) -> str:
    if report.stage == "encode":
        return "text encoding" if report.module.startswith(TEXT_ENCODER) else "input encoding"
    return "decoding"


def _attributes_of(request: GenerationRequest) -> dict[str, str | int | float]:
    """Attributes of a request's span. No prompt: traces go to other places than images do."""
    return {
        "stepserve.request_id": request.id,
        "stepserve.model": request.model,
        "stepserve.task": request.task.value,
        "stepserve.size": request.final_size,
        "stepserve.images": request.n,
        "stepserve.num_inference_steps": request.num_inference_steps,
        "stepserve.guidance_scale": request.guidance_scale,
        "stepserve.scheduler": request.scheduler,
        "stepserve.priority": request.priority.name.lower(),
    }


def _set_outcome(span: Span, outcome: Finished | Failed | None) -> None:
    if isinstance(outcome, Finished):
        span.set_attribute("stepserve.outcome", "finished")
        timings = outcome.timings
        span.set_attribute("stepserve.batch_share", round(timings.batch_share, 4))
        span.set_attribute("stepserve.denoiser_calls", timings.denoiser_calls)
        span.set_attribute("stepserve.denoiser_calls_run", timings.denoiser_calls_run)
    elif outcome is not None:
        kind = type(outcome.error).__name__
        span.set_attribute("stepserve.outcome", kind)
        # The message of an error may quote what the client wrote.
        span.set_status(Status(StatusCode.ERROR, kind))
