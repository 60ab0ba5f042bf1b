"""What an engine reports: each forward, each end, and its batch at one moment.

Metrics, traces and the batch view all read the same reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings


# Made for each forward on the engine's thread: tuples are the cheapest thing there is.
class ForwardReport(NamedTuple):
    """One forward of a module that succeeded.

    Args:
        number: counts the forwards of its engine from 1.
        stage: what its time is counted as, one of `Stage`.
        module: module and method, such as `unet.forward`.
        requests: those that shared it, with one call each, and the rows of each.
        rows: of all requests, without padding.
        padded_rows: rows that were run besides, to fill the forward up.
        row_limit: most rows of one denoiser forward at that time.
        seconds: how long it took.
        expected_s: what the cost model predicted; None for a shape that it had never seen.
        ended_s: when it ended, on the engine's clock.
        skipped: requests that skipped a step since the denoiser's forward before this one.
    """

    number: int
    stage: str
    module: str
    requests: tuple[tuple[RequestKey, int], ...]
    rows: int
    padded_rows: int
    row_limit: int
    seconds: float
    expected_s: float | None
    ended_s: float
    skipped: tuple[RequestKey, ...] = ()


class EndReport(NamedTuple):
    """One request that ended in `state`, at `ended_s` on the engine's clock.

    `step_cache` is the method of its step cache; empty: it had none.
    """

    key: RequestKey
    state: RequestState
    timings: Timings
    images: int
    steps_left: int
    has_deadline: bool
    ended_s: float
    step_cache: str = ""


@dataclass(frozen=True)
class RequestInBatch:
    """An accepted request that has not ended; another owner's has no id.

    `step` of its `steps` denoiser calls are done, of which `skipped` took no row.
    """

    id: str | None
    state: RequestState
    step: int
    steps: int
    rows: int
    skipped: int = 0


@dataclass(frozen=True)
class RowsInForward:
    """How many rows of a forward one request had; another owner's has no id."""

    id: str | None
    rows: int


@dataclass(frozen=True)
class SharedForward:
    """One forward of a module. `number` counts the forwards of its replica from 1.

    `padded_rows` were run besides the `rows` of requests, to fill the forward up. `skipped` are the
    requests that skipped a step since the denoiser's forward before; another owner's has no id.
    """

    number: int
    module: str
    rows: int
    padded_rows: int
    seconds: float
    requests: tuple[RowsInForward, ...]
    skipped: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class BatchView:
    """The running batch of one replica, and its latest forwards, oldest first.

    `row_limit` is the most rows of one shared denoiser forward.
    """

    row_limit: int
    requests: tuple[RequestInBatch, ...]
    forwards: tuple[SharedForward, ...]


def id_for(owner: str, key: RequestKey) -> str | None:
    """The id of a request as `owner` may see it: None if the request is another's."""
    return key.id if key.owner == owner else None


def forward_for(owner: str, report: ForwardReport) -> SharedForward:
    """A forward as `owner` may see it."""
    return SharedForward(
        report.number,
        report.module,
        report.rows,
        report.padded_rows,
        report.seconds,
        tuple(RowsInForward(id_for(owner, key), rows) for key, rows in report.requests),
        tuple(id_for(owner, key) for key in report.skipped),
    )
