"""What the engine tells whoever watches it, such as metrics."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings


# Made for each forward on the engine's thread: tuples are the cheapest thing there is.
class ForwardReport(NamedTuple):
    """One shared forward that succeeded.

    `requests` tells the id, owner and rows of each that shared it. `ended_s` is a moment on the
    engine's clock. `expected_s` is what the cost model foretold, or None for a shape that it had
    never seen.
    """

    stage: str
    module: str
    requests: tuple[tuple[str, str, int], ...]
    ended_s: float
    calls: int
    rows: int
    padded_rows: int
    row_limit: int
    seconds: float
    expected_s: float | None


class WorkReport(NamedTuple):
    """One piece of work that ended, at `ended_s` on the engine's clock."""

    key: RequestKey
    ended_s: float
    state: RequestState
    timings: Timings
    images: int
    steps_left: int
    has_deadline: bool


class Observer(Protocol):
    """Hears of forwards and ends on the engine's thread: must return at once, and not raise."""

    def forward_ended(self, report: ForwardReport) -> None:
        """A shared forward succeeded."""
        ...

    def work_ended(self, report: WorkReport) -> None:
        """A piece of work was answered."""
        ...


class NullObserver:
    """Watches nothing."""

    def forward_ended(self, report: ForwardReport) -> None:
        """Ignored."""

    def work_ended(self, report: WorkReport) -> None:
        """Ignored."""


NOBODY = NullObserver()


class CompositeObserver:
    """Tells each of several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def forward_ended(self, report: ForwardReport) -> None:
        """A shared forward succeeded."""
        for observer in self._observers:
            observer.forward_ended(report)

    def work_ended(self, report: WorkReport) -> None:
        """A piece of work was answered."""
        for observer in self._observers:
            observer.work_ended(report)
