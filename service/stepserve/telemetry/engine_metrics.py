"""An engine's reports as metrics: kept on the engine's thread, recorded on another."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.states import RequestState
from stepserve.telemetry import catalogue as c
from stepserve.telemetry.instruments import Instruments

Item = TypeVar("Item")

DENOISE = "denoise"


@dataclass(frozen=True)
class Totals:
    """Totals of an engine since its start."""

    retries: int = 0
    out_of_memory: int = 0
    busy_s: float = 0.0
    images_withheld: int = 0


@dataclass(frozen=True)
class Gauges:
    """Values of a replica at one moment."""

    backlog_s: float
    requests: int
    images: int
    image_limit: int
    row_limit: int
    load_s: float
    memory_bytes: dict[str, int]


class EngineMetrics:
    """An engine's observer. `flush` records what was reported since the last time.

    Args:
        instruments: where values go.
        model: the model's id.
        replica: name of this replica among those of the model.
    """

    def __init__(self, instruments: Instruments, model: str, replica: str) -> None:
        self._to = instruments
        self._model = {"model": model}
        self._replica = {"model": model, "replica": replica}
        # Appending and popping at the ends is safe between threads.
        self._forwards: deque[ForwardReport] = deque()
        self._ends: deque[EndReport] = deque()
        self._totals = Totals()

    def forward_ended(self, report: ForwardReport) -> None:
        """A forward succeeded."""
        self._forwards.append(report)

    def request_ended(self, report: EndReport) -> None:
        """A request ended."""
        self._ends.append(report)

    def started(self, totals: Totals) -> None:
        """The replica is warm. What `totals` holds by now is not counted."""
        self._totals = totals
        self._to.count(c.REPLICA_STARTS, 1, self._model)

    def flush(self, totals: Totals, gauges: Gauges) -> None:
        """Record the reports since the last flush, and present values. Off the engine's thread."""
        self._record_forwards(list(_taken(self._forwards)))
        for end in _taken(self._ends):
            self._record_end(end)
        self._record_totals(totals)
        self._record_gauges(gauges)

    def _record_forwards(self, forwards: list[ForwardReport]) -> None:
        for forward in forwards:
            self._observe_forward(forward)
        sums: defaultdict[tuple[c.Metric, str], float] = defaultdict(float)
        for forward in forwards:
            for metric, amount in (
                (c.FORWARDS, 1),
                (c.CALLS, len(forward.requests)),
                (c.ROWS, forward.rows),
                (c.PADDED_ROWS, forward.padded_rows),
                (c.FORWARD_SECONDS, forward.seconds),
            ):
                sums[metric, forward.stage] += amount
        for (metric, stage), amount in sums.items():
            self._to.count(metric, amount, self._of(stage))
        self._to.count(c.STEPS, sums[c.CALLS, DENOISE], self._model)

    def _observe_forward(self, forward: ForwardReport) -> None:
        labels = self._of(forward.stage)
        self._to.observe(c.BATCH_ROWS, forward.rows, labels)
        if forward.stage == DENOISE:
            share = min(forward.rows / forward.row_limit, 1.0)
            self._to.observe(c.OCCUPANCY, share, self._model)
        if forward.expected_s is not None and forward.seconds > 0:
            error = abs(forward.expected_s - forward.seconds) / forward.seconds
            self._to.observe(c.COST_ERROR, error, labels)

    def _record_end(self, end: EndReport) -> None:
        timings, outcome = end.timings, {**self._model, "outcome": end.state.value}
        self._to.count(c.REQUESTS, 1, outcome)
        self._to.observe(c.REQUEST_SECONDS, timings.total_s, outcome)
        self._to.observe(c.QUEUE_SECONDS, timings.queue_s, self._model)
        if end.state is RequestState.FINISHED:
            self._record_finished(end)
        elif end.state in (RequestState.CANCELLED, RequestState.EXPIRED):
            self._to.count(c.STEPS_SAVED, end.steps_left, self._model)
        if end.has_deadline:
            self._record_deadline(end.state)
        if timings.denoiser_calls_skipped:
            method = {**self._model, "method": end.step_cache}
            self._to.count(c.SKIPPED_CALLS, timings.denoiser_calls_skipped, method)

    def _record_finished(self, end: EndReport) -> None:
        timings = end.timings
        self._to.count(c.IMAGES, end.images, self._model)
        self._to.observe(c.FIRST_STEP_SECONDS, timings.first_step_s, self._model)
        for stage in ("encode", DENOISE, "decode"):
            self._to.observe(c.STAGE_SECONDS, getattr(timings, f"{stage}_s"), self._of(stage))

    def _record_deadline(self, state: RequestState) -> None:
        results = {RequestState.FINISHED: "met", RequestState.EXPIRED: "missed"}
        if state in results:
            self._to.count(c.DEADLINES, 1, {**self._model, "result": results[state]})

    def _record_totals(self, totals: Totals) -> None:
        before, self._totals = self._totals, totals
        for metric, amount in (
            (c.RETRIES, totals.retries - before.retries),
            (c.OUT_OF_MEMORY, totals.out_of_memory - before.out_of_memory),
            (c.BUSY_SECONDS, totals.busy_s - before.busy_s),
            (c.CONTENT_FILTERED, totals.images_withheld - before.images_withheld),
        ):
            self._to.count(metric, amount, self._model)

    def _record_gauges(self, gauges: Gauges) -> None:
        values = {
            c.BACKLOG_SECONDS: gauges.backlog_s,
            c.IN_FLIGHT: gauges.requests,
            c.IMAGES_PENDING: gauges.images,
            c.IMAGE_LIMIT: gauges.image_limit,
            c.ROW_LIMIT: gauges.row_limit,
            c.LOAD_SECONDS: gauges.load_s,
        }
        for metric, value in values.items():
            self._to.set(metric, value, self._replica)
        for kind, amount in gauges.memory_bytes.items():
            self._to.set(c.MEMORY_BYTES, amount, {**self._replica, "kind": kind})

    def _of(self, stage: str) -> dict[str, str]:
        return {**self._model, "stage": stage}


def _taken(items: deque[Item]) -> Iterator[Item]:
    """What is there by now; others may append meanwhile."""
    for _ in range(len(items)):
        yield items.popleft()
