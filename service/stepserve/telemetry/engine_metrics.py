"""What an engine reports, gathered on its thread for next to nothing and recorded elsewhere."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings
from stepserve.telemetry import catalogue as c
from stepserve.telemetry.instruments import Instruments

Item = TypeVar("Item")

DENOISE = "denoise"


class Forward(Protocol):
    """One shared forward that succeeded."""

    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def calls(self) -> int: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def padded_rows(self) -> int: ...  # noqa: D102
    @property
    def row_limit(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def expected_s(self) -> float | None: ...  # noqa: D102


class Ending(Protocol):
    """One piece of work that ended."""

    @property
    def state(self) -> RequestState: ...  # noqa: D102
    @property
    def timings(self) -> Timings: ...  # noqa: D102
    @property
    def images(self) -> int: ...  # noqa: D102
    @property
    def steps_left(self) -> int: ...  # noqa: D102
    @property
    def has_deadline(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class Totals:
    """Totals of an engine since its start."""

    retries: int = 0
    out_of_memory: int = 0
    busy_s: float = 0.0
    images_withheld: int = 0


@dataclass(frozen=True)
class Standing:
    """How a replica stands at one moment."""

    backlog_s: float
    requests: int
    images: int
    image_limit: int
    row_limit: int
    load_s: float
    memory_bytes: dict[str, int]


class EngineMetrics:
    """An engine's observer. `flush` records what was heard since the last time.

    Args:
        instruments: where values go.
        model: the model's id.
        replica: tells this replica apart from others of the model.
    """

    def __init__(self, instruments: Instruments, model: str, replica: str) -> None:
        self._to = instruments
        self._model = {"model": model}
        self._replica = {"model": model, "replica": replica}
        # Appending and popping at the ends is safe between threads.
        self._forwards: deque[Forward] = deque()
        self._endings: deque[Ending] = deque()
        self._told = Totals()

    def forward_ended(self, report: Forward) -> None:
        """A shared forward succeeded."""
        self._forwards.append(report)

    def work_ended(self, report: Ending) -> None:
        """A piece of work was answered."""
        self._endings.append(report)

    def started(self) -> None:
        """The replica is warm."""
        self._to.count(c.REPLICA_STARTS, 1, self._model)

    def flush(self, totals: Totals, standing: Standing) -> None:
        """Record what was heard, and how things stand now. Not on the engine's thread."""
        self._record_forwards(list(_taken(self._forwards)))
        for ending in _taken(self._endings):
            self._record_ending(ending)
        self._record_totals(totals)
        self._record_standing(standing)

    def _record_forwards(self, forwards: list[Forward]) -> None:
        for forward in forwards:
            self._observe_forward(forward)
        sums: dict[c.Metric, Counter[str]] = {}
        for metric, name in (
            (c.CALLS, "calls"),
            (c.ROWS, "rows"),
            (c.PADDED_ROWS, "padded_rows"),
            (c.FORWARD_SECONDS, "seconds"),
        ):
            sums[metric] = Counter()
            for forward in forwards:
                sums[metric][forward.stage] += getattr(forward, name)
        sums[c.FORWARDS] = Counter(forward.stage for forward in forwards)
        for metric, by_stage in sums.items():
            for stage, amount in by_stage.items():
                self._to.count(metric, amount, self._of(stage))
        self._to.count(c.STEPS, sums[c.CALLS][DENOISE], self._model)

    def _observe_forward(self, forward: Forward) -> None:
        labels = self._of(forward.stage)
        self._to.observe(c.BATCH_ROWS, forward.rows, labels)
        if forward.stage == DENOISE:
            share = min(forward.rows / forward.row_limit, 1.0)
            self._to.observe(c.OCCUPANCY, share, self._model)
        if forward.expected_s is not None and forward.seconds > 0:
            error = abs(forward.expected_s - forward.seconds) / forward.seconds
            self._to.observe(c.COST_ERROR, error, labels)

    def _record_ending(self, ending: Ending) -> None:
        timings, outcome = ending.timings, {**self._model, "outcome": ending.state.value}
        self._to.count(c.REQUESTS, 1, outcome)
        self._to.observe(c.REQUEST_SECONDS, timings.total_s, outcome)
        self._to.observe(c.QUEUE_SECONDS, timings.queue_s, self._model)
        if ending.state is RequestState.FINISHED:
            self._record_finished(ending)
        elif ending.state in (RequestState.CANCELLED, RequestState.EXPIRED):
            self._to.count(c.STEPS_SAVED, ending.steps_left, self._model)
        if ending.has_deadline:
            self._record_deadline(ending.state)

    def _record_finished(self, ending: Ending) -> None:
        timings = ending.timings
        self._to.count(c.IMAGES, ending.images, self._model)
        self._to.observe(c.FIRST_STEP_SECONDS, timings.first_step_s, self._model)
        for stage in ("encode", DENOISE, "decode"):
            self._to.observe(c.STAGE_SECONDS, getattr(timings, f"{stage}_s"), self._of(stage))

    def _record_deadline(self, state: RequestState) -> None:
        results = {RequestState.FINISHED: "met", RequestState.EXPIRED: "missed"}
        if state in results:
            self._to.count(c.DEADLINES, 1, {**self._model, "result": results[state]})

    def _record_totals(self, totals: Totals) -> None:
        told, self._told = self._told, totals
        self._to.count(c.RETRIES, totals.retries - told.retries, self._model)
        self._to.count(c.OUT_OF_MEMORY, totals.out_of_memory - told.out_of_memory, self._model)
        self._to.count(c.BUSY_SECONDS, totals.busy_s - told.busy_s, self._model)
        withheld = totals.images_withheld - told.images_withheld
        self._to.count(c.CONTENT_FILTERED, withheld, self._model)

    def _record_standing(self, standing: Standing) -> None:
        values = {
            c.BACKLOG_SECONDS: standing.backlog_s,
            c.IN_FLIGHT: standing.requests,
            c.IMAGES_PENDING: standing.images,
            c.IMAGE_LIMIT: standing.image_limit,
            c.ROW_LIMIT: standing.row_limit,
            c.LOAD_SECONDS: standing.load_s,
        }
        for metric, value in values.items():
            self._to.set(metric, value, self._replica)
        for kind, amount in standing.memory_bytes.items():
            self._to.set(c.MEMORY_BYTES, amount, {**self._replica, "kind": kind})

    def _of(self, stage: str) -> dict[str, str]:
        return {**self._model, "stage": stage}


def _taken(items: deque[Item]) -> Iterator[Item]:
    """What is there by now; others may append meanwhile."""
    for _ in range(len(items)):
        yield items.popleft()
