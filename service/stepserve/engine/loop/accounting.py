"""What is learned, counted and reported of forwards and of requests that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import RequestKey
from stepserve.engine.calls.call import longest
from stepserve.engine.loop.executor import Counters, Forward
from stepserve.engine.scheduling.estimator import CompletionEstimator
from stepserve.engine.scheduling.row_limits import RowLimits
from stepserve.engine.tracks.track import Clock, Stage, Track

SHOWN_FORWARDS = 64


class Observer(Protocol):
    """Hears of forwards and ends on the engine's thread: must return at once, and not raise."""

    def forward_ended(self, report: ForwardReport) -> None:
        """A forward succeeded."""

    def request_ended(self, report: EndReport) -> None:
        """A request ended; its listener was called before."""


class Accounting:
    """Tells tracks, estimator, counters and observers what became of each forward.

    Args:
        estimator: learns what forwards and requests take.
        row_limits: hear of forwards that went well.
        counters: that are kept.
        clock: seconds, monotonic.
        observers: hear of forwards and ends; may be appended to from any thread.
    """

    def __init__(
        self,
        estimator: CompletionEstimator,
        row_limits: RowLimits,
        counters: Counters,
        clock: Clock,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.counters = counters
        self.latest_forwards: deque[ForwardReport] = deque(maxlen=SHOWN_FORWARDS)
        self._estimator = estimator
        self._row_limits = row_limits
        self._clock = clock
        self._observers = observers
        # Since the last forward of a denoiser, in their order.
        self._skipped: dict[RequestKey, None] = {}

    def steps_skipped(self, tracks: Sequence[Track]) -> None:
        """These went on without a row."""
        self._skipped |= dict.fromkeys(track.key for track in tracks)

    def forward_launched(self, forward: Forward, tracks: Sequence[Track]) -> None:
        """What the tracks, one for each call, should know of a forward before they go on."""
        if forward.stage is not Stage.DENOISE:
            return
        rows = forward.rows
        self.counters.denoiser_rows += rows
        for track, call in zip(tracks, forward.calls, strict=True):
            # Before it is counted, as the next one may be of another size.
            self._estimator.step_ended(track, call)
            track.steps_done += 1
            track.shares.append(call.rows / rows)
            track.first_step_s = track.first_step_s or forward.timing.started_s

    def forward_ended(self, forward: Forward, tracks: Sequence[Track], row_limit: int) -> None:
        """Wait for the end of a forward, report it, and learn from it."""
        seconds, rows, call = forward.timing.wait(), forward.rows, longest(forward.calls)
        shape, stage, cost = call.shape, forward.stage, self._estimator.cost
        self.counters.forwards += 1
        report = ForwardReport(
            number=self.counters.forwards,
            stage=call.method.stage,
            module=call.method.name,
            requests=tuple(
                (track.key, call.rows) for track, call in zip(tracks, forward.calls, strict=True)
            ),
            rows=rows,
            padded_rows=forward.padded_rows,
            row_limit=row_limit,
            seconds=seconds,
            # Before anything is learned from it.
            expected_s=cost.predict(shape, rows) if cost.knows(shape) else None,
            ended_s=self._clock(),
            skipped=self._take_skipped(stage),
        )
        self.latest_forwards.append(report)
        for observer in self._observers:
            observer.forward_ended(report)
        for track in tracks:
            track.stage_s[stage] = track.stage_s.get(stage, 0.0) + seconds
        if stage is Stage.DENOISE:
            self.counters.denoiser_s += seconds
        cost.observe(shape, rows, seconds)
        self._row_limits.succeeded(call, rows)
        self.counters.padded_rows += forward.padded_rows
        self.counters.rows += rows
        self.counters.calls += len(forward.calls)
        self.counters.forward_s += seconds

    def _take_skipped(self, stage: Stage) -> tuple[RequestKey, ...]:
        if stage is not Stage.DENOISE:
            return ()
        skipped, self._skipped = tuple(self._skipped), {}
        return skipped

    def tick_ended(self, started_s: float, forward_s: float) -> None:
        """A tick with a forward is over.

        Args:
            started_s: when it began, on the engine's clock.
            forward_s: of the counters, when it began.
        """
        busy_s = self._clock() - started_s
        self.counters.busy_s += busy_s
        self._estimator.tick_ended(busy_s, self.counters.forward_s - forward_s)

    def track_ended(self, track: Track) -> None:
        """A request has ended, and its listener has heard it."""
        now_s = self._clock()
        self._estimator.track_ended(track, now_s)
        report = EndReport(
            key=track.key,
            state=track.state,
            timings=track.timings(now_s),
            images=track.images,
            steps_left=track.steps_left,
            has_deadline=track.deadline_s is not None,
            ended_s=now_s,
            step_cache="" if track.step_cache is None else track.step_cache.use.method.value,
        )
        for observer in self._observers:
            observer.request_ended(report)
