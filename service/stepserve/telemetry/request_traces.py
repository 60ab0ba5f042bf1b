"""The spans of one replica's requests, made from what its engine and its events tell.

One span for each request, below the span that its trace context names, with children for its wait,
its encoding, its denoising, its decoding and its files. Forwards with the same companions in a row
are one denoising span, linked to the spans of those companions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Link, Span, Status, StatusCode
from opentelemetry.trace.propagation import set_span_in_context

from stepserve import __version__
from stepserve.domain.events import Accepted, Event, Failed, Finished
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.timings import Timings
from stepserve.telemetry.engine_metrics import DENOISE
from stepserve.telemetry.tracing import NAME, carried_context

MOST_SPANS = 32
"""Of the denoising of one request: with more changes of company the last one goes on to the end."""

DENOISING = (DENOISE, "control")
TEXT_ENCODER = "text_encoder"

Attributes = Mapping[str, str | int | float]


class Forward(Protocol):
    """One shared forward that succeeded."""

    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def module(self) -> str: ...  # noqa: D102
    @property
    def requests(self) -> Sequence[tuple[str, str, int]]: ...  # noqa: D102
    @property
    def ended_s(self) -> float: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102


class Ending(Protocol):
    """One piece of work that ended."""

    @property
    def key(self) -> RequestKey: ...  # noqa: D102
    @property
    def ended_s(self) -> float: ...  # noqa: D102
    @property
    def timings(self) -> Timings: ...  # noqa: D102


@dataclass
class Company:
    """Denoising forwards in a row that a request had with the same companions."""

    companions: set[RequestKey]
    began_s: float
    ended_s: float
    first_step: int
    steps: int = 0
    forwards: int = 0
    rows: int = 0
    links: dict[int, Link] = field(default_factory=dict)


@dataclass
class TracedRequest:
    """A request at work: its span, and what is known of it so far."""

    span: Span
    steps: int = 0
    spans: int = 0
    company: Company | None = None
    work_ended_s: float | None = None
    is_accepted: bool = False
    ending: Finished | Failed | None = None
    ended_s: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether everything has been heard: a request that was refused was never at work."""
        return self.ending is not None and (self.work_ended_s is not None or not self.is_accepted)


class RequestTraces:
    """An engine's observer, and a listener to the events of requests.

    All methods but `flush` only note what they hear, whatever thread they are called on; `flush`
    makes the spans.

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
        self._heard: deque[Callable[[], None]] = deque()
        # Those at work; touched by `flush` alone, but for the question whether there are any.
        self._requests: dict[RequestKey, TracedRequest] = {}

    def begin(self, request: GenerationRequest) -> None:
        """A request is about to be handed to the engine."""
        span = self._tracer.start_span(
            "generate",
            context=carried_context(request.trace_context),
            attributes=_asked(request) | dict(self._attributes),
            start_time=self._ns(self._clock()),
        )
        if span.is_recording():
            traced = TracedRequest(span)
            self._heard.append(partial(self._requests.__setitem__, request.key, traced))

    def hear(self, key: RequestKey, event: Event) -> None:
        """Something happened to a request."""
        match event:
            case Accepted():
                self._heard.append(partial(self._accepted, key))
            case Finished() | Failed():
                self._heard.append(partial(self._ended, key, event, self._clock()))

    def forward_ended(self, report: Forward) -> None:
        """A shared forward succeeded."""
        if self._requests or self._heard:
            self._heard.append(partial(self._forward, report))

    def work_ended(self, report: Ending) -> None:
        """The engine is done with a request."""
        if self._requests or self._heard:
            self._heard.append(partial(self._work_ended, report))

    def flush(self) -> None:
        """Make spans of what was heard. Not on the engine's thread."""
        for _ in range(len(self._heard)):
            self._heard.popleft()()

    def close(self) -> None:
        """End what is still open, and send everything."""
        self.flush()
        now_s = self._clock()
        for traced in self._requests.values():
            self._end_co_batching(traced)
            traced.span.end(self._ns(now_s))
        self._requests.clear()
        self._provider.shutdown()

    def _accepted(self, key: RequestKey) -> None:
        if traced := self._requests.get(key):
            traced.is_accepted = True

    def _forward(self, report: Forward) -> None:
        names = {RequestKey(request_id, owner) for request_id, owner, _ in report.requests}
        for key in names & self._requests.keys():
            traced = self._requests[key]
            if report.stage in DENOISING:
                self._denoise(traced, names - {key}, report)
            else:
                self._end_co_batching(traced)
                began_s = report.ended_s - report.seconds
                module: dict[str, str | int | float] = {
                    "stepserve.module": report.module,
                    "stepserve.companions": len(names) - 1,
                }
                self._child(traced, _span_name(report), (began_s, report.ended_s), module)

    def _denoise(self, traced: TracedRequest, companions: set[RequestKey], report: Forward) -> None:
        company = traced.company
        changed = company is None or company.companions != companions
        if company is None or (changed and traced.spans < MOST_SPANS):
            self._end_co_batching(traced)
            began_s = report.ended_s - report.seconds
            traced.spans += 1
            company = Company(companions, began_s, report.ended_s, first_step=traced.steps + 1)
            traced.company = company
        company.companions = companions
        company.ended_s = report.ended_s
        company.forwards += 1
        company.rows += sum(rows for _, _, rows in report.requests)
        evaluations = report.stage == DENOISE
        company.steps += evaluations
        traced.steps += evaluations
        if changed:
            self._link(company, companions)

    def _link(self, company: Company, companions: set[RequestKey]) -> None:
        for key in companions & self._requests.keys():
            context = self._requests[key].span.get_span_context()
            attributes = {"stepserve.request_id": key.id}
            company.links.setdefault(context.span_id, Link(context, attributes))

    def _end_co_batching(self, traced: TracedRequest) -> None:
        company, traced.company = traced.company, None
        if company is None:
            return
        attributes = {
            "stepserve.first_step": company.first_step,
            "stepserve.steps": company.steps,
            "stepserve.companions": len(company.companions),
            "stepserve.rows_per_forward": round(company.rows / company.forwards, 2),
        }
        times = (company.began_s, company.ended_s)
        self._child(traced, "denoising", times, attributes, list(company.links.values()))

    def _work_ended(self, report: Ending) -> None:
        traced = self._requests.get(report.key)
        if traced is None:
            return
        self._end_co_batching(traced)
        accepted_s = report.ended_s - report.timings.total_s
        self._child(traced, "queue", (accepted_s, accepted_s + report.timings.queue_s))
        traced.work_ended_s = report.ended_s
        self._end_if_over(report.key, traced)

    def _ended(self, key: RequestKey, event: Finished | Failed, now_s: float) -> None:
        if traced := self._requests.get(key):
            traced.ending, traced.ended_s = event, now_s
            self._end_if_over(key, traced)

    def _end_if_over(self, key: RequestKey, traced: TracedRequest) -> None:
        if not traced.is_over:
            return
        if isinstance(traced.ending, Finished) and traced.work_ended_s is not None:
            times = (traced.work_ended_s, max(traced.work_ended_s, traced.ended_s))
            self._child(traced, "image encoding", times)
        _tell_ending(traced.span, traced.ending)
        traced.span.end(self._ns(traced.ended_s))
        del self._requests[key]

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


def _span_name(report: Forward) -> str:
    if report.stage == "encode":
        return "text encoding" if report.module.startswith(TEXT_ENCODER) else "input encoding"
    return "decoding"


def _asked(request: GenerationRequest) -> dict[str, str | int | float]:
    """What is told of a request. No prompt: traces go to other places than images do."""
    return {
        "stepserve.request_id": request.id,
        "stepserve.model": request.model,
        "stepserve.task": request.task.value,
        "stepserve.size": f"{request.width}x{request.height}",
        "stepserve.images": request.n,
        "stepserve.num_inference_steps": request.num_inference_steps,
        "stepserve.guidance_scale": request.guidance_scale,
        "stepserve.scheduler": request.scheduler,
        "stepserve.priority": request.priority.name.lower(),
    }


def _tell_ending(span: Span, ending: Finished | Failed | None) -> None:
    if isinstance(ending, Finished):
        span.set_attribute("stepserve.outcome", "finished")
        span.set_attribute("stepserve.batch_share", round(ending.timings.batch_share, 4))
    elif ending is not None:
        kind = type(ending.error).__name__
        span.set_attribute("stepserve.outcome", kind)
        # The message of an error may quote what the client wrote.
        span.set_status(Status(StatusCode.ERROR, kind))
