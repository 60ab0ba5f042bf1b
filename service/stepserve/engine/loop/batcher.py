"""The heart: decide, run, wake. Single-threaded; the engine wraps a thread around it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from stepserve.domain.errors import ExpiredError, StoppedError
from stepserve.domain.reports import BatchView, RequestInBatch, forward_for, id_for
from stepserve.domain.requests import RequestKey
from stepserve.engine.calls.call import Call
from stepserve.engine.loop.accounting import Accounting, Observer
from stepserve.engine.loop.execution import DEFAULT_EXECUTION, Execution
from stepserve.engine.loop.executor import Counters, Done, Executor, Forward, Raised
from stepserve.engine.loop.side_stream import SideStream
from stepserve.engine.scheduling.estimator import CompletionEstimator
from stepserve.engine.scheduling.policy import SHORTEST_FIRST, Policy
from stepserve.engine.scheduling.row_limits import RowLimits
from stepserve.engine.scheduling.scheduler import Scheduler
from stepserve.engine.tracks.step_cache import read_decisions
from stepserve.engine.tracks.track import Clock, Stage, Track


class Batcher:
    """Steps many tracks forward, one shared forward at a time.

    Args:
        row_limit: most rows of one denoiser forward; see `Scheduler`.
        execution: how forwards are to run.
        estimator: learns what forwards and requests take.
        clock: seconds, monotonic.
        on_ended: hears of each track once, after its listener did.
        policy: decides who goes next.
        observers: hear of forwards and ends; may be appended to from any thread.
    """

    def __init__(
        self,
        row_limit: int = 32,
        execution: Execution = DEFAULT_EXECUTION,
        estimator: CompletionEstimator | None = None,
        clock: Clock = time.perf_counter,
        on_ended: Callable[[Track], None] = lambda track: None,
        policy: Policy = SHORTEST_FIRST,
        observers: Sequence[Observer] = (),
    ) -> None:
        estimator = estimator or CompletionEstimator()
        self.execution = execution
        self.clock = clock
        self.counters = Counters()
        row_limits = RowLimits()
        self.scheduler = Scheduler(
            row_limit, row_limits, estimator, policy, execution.one_at_a_time
        )
        self.executor = Executor(row_limits, self.counters, clock, execution.start_timing)
        self._accounting = Accounting(estimator, row_limits, self.counters, clock, observers)
        # What the device decodes beside steps, oldest first.
        self._decoding: deque[tuple[Track, Done]] = deque()
        self._on_ended = on_ended
        if execution.row_limit is not None:
            self.scheduler.limit_rows(row_limit)

    def stop_track(self, key: RequestKey, error: BaseException) -> None:
        """End a track by raising `error` from the call it is parked at, if it is there."""
        for track in self.scheduler.find(key):
            track.stop(error)
        self._forget_ended()

    def release(self, key: RequestKey) -> None:
        """Let a held track start, if it is there."""
        for track in self.scheduler.find(key):
            track.held = False

    def stop_all(self, make_error: Callable[[str], BaseException]) -> None:
        """End every track with the error that `make_error` makes for its request id."""
        for track in list(self.scheduler.tracks):
            track.stop(make_error(track.id))
        self._forget_ended()

    def tick(self) -> bool:
        """Start what fits, run one forward, wake its tracks. False if there was nothing to do."""
        started_s = self.clock()
        self._drop_expired(started_s)
        woken_any = self._wake_decoded() | self._skip_steps()
        started_any = self._start_queued()
        group = self._pick()
        if group:
            forward_s = self.counters.forward_s
            self._advance(group)
            self._accounting.tick_ended(started_s, forward_s)
        elif self._decoding and not started_any:
            woken_any = self._wake_decoded(at_least=1)
        return started_any or woken_any or bool(group)

    def view(self, owner: str = "") -> BatchView:
        """The batch as `owner` may see it. May be called from any thread."""
        forwards = self._accounting.latest_forwards.copy()
        return BatchView(
            row_limit=self.scheduler.row_limit,
            requests=tuple(_in_batch(track, owner) for track in self.scheduler.tracks),
            forwards=tuple(forward_for(owner, report) for report in forwards),
        )

    def _drop_expired(self, now_s: float) -> None:
        expired = self.scheduler.expired(now_s)
        for track in expired:
            track.stop(_expired(track))
        if expired:
            self._forget_ended()

    def _skip_steps(self) -> bool:
        """Let go on whoever skips its step, up to a call that has to run. Whether anybody does."""
        skipped: list[Track] = []
        while deciding := [t for t in self.scheduler.tracks if t.decision is not None]:
            read_decisions([track.decision for track in deciding if track.decision is not None])
            for track in deciding:
                decision, track.decision = track.decision, None
                if decision is not None and decision.skips:
                    track.skip()
                    skipped.append(track)
        if skipped:
            self._accounting.steps_skipped(skipped)
            self._forget_ended()
        return bool(skipped)

    def _start_queued(self) -> bool:
        started_any = False
        while track := self.scheduler.next_to_start():
            track.start()
            # Those that ended before their first call leave their room to the next in line.
            self._forget_ended()
            started_any = True
        return started_any

    def _pick(self) -> list[Track]:
        busy, adjust = {track for track, _ in self._decoding}, self.execution.adjust
        if adjust is not None:
            for track in self.scheduler.running:
                if track.call is not None and track not in busy:
                    track.call = adjust(track.call)
        return self.scheduler.pick(busy)

    def _advance(self, group: Sequence[Track]) -> None:
        """Run one forward, and wake its tracks."""
        calls, side_stream = _calls(group), self.execution.side_stream
        if side_stream is not None and calls[0].method.stage == Stage.DECODE:
            self._decode_aside(group, calls, side_stream)
            return
        results = self.executor.run(calls)
        # The device may still be busy, and what comes after steps may be launched behind it.
        running = []
        for forward, tracks in self._launched(group, results):
            if forward.timing.runs_on and forward.stage in (Stage.CONTROL, Stage.DENOISE):
                running.append((forward, tracks))
            else:
                self._account(forward, tracks)
        self._wake(group, results)
        for forward, tracks in running:
            self._account(forward, tracks)

    def _launched(
        self, group: Sequence[Track], results: Sequence[Done | Raised]
    ) -> list[tuple[Forward, list[Track]]]:
        """The forwards that succeeded, each with the tracks that took part."""
        parts: dict[Forward, list[Track]] = {}
        for track, result in zip(group, results, strict=True):
            if isinstance(result, Done):
                parts.setdefault(result.forward, []).append(track)
        for forward, tracks in parts.items():
            self._accounting.forward_launched(forward, tracks)
        return list(parts.items())

    def _decode_aside(
        self, group: Sequence[Track], calls: Sequence[Call], side_stream: SideStream
    ) -> None:
        with side_stream.launching():
            results = self.executor.run(calls)
        for track, result in zip(group, results, strict=True):
            if isinstance(result, Done):
                self._decoding.append((track, result))
            else:
                self._wake([track], [result])

    def _wake_decoded(self, at_least: int = 0) -> bool:
        """Wake the tracks whose decoding has ended; wait for so many. Whether there was any."""
        woken = 0
        while self._decoding:
            if woken >= at_least and not self._decoding[0][1].forward.timing.has_ended():
                break
            track, done = self._decoding.popleft()
            self._account(done.forward, [track])
            self._wake_aside(track, done.output)
            woken += 1
        if woken:
            self._forget_ended()
        return woken > 0

    def _wake_aside(self, track: Track, output: Any) -> None:
        side_stream = self.execution.side_stream
        # It may have been ended meanwhile.
        if side_stream is None or track.ended:
            return
        with side_stream.waking():
            track.resume(output)
        if not track.ended:
            side_stream.rejoin()

    def _account(self, forward: Forward, tracks: Sequence[Track]) -> None:
        self._accounting.forward_ended(forward, tracks, self.scheduler.row_limit)

    def _wake(self, group: Sequence[Track], results: Sequence[Done | Raised]) -> None:
        for track, result in zip(group, results, strict=True):
            if isinstance(result, Done):
                track.resume(result.output)
            else:
                track.throw(_device_lost(track) if self.executor.device_lost else result.error)
        self._forget_ended()

    def _forget_ended(self) -> None:
        for track in self.scheduler.remove_ended():
            self._accounting.track_ended(track)
            self._on_ended(track)


def _in_batch(track: Track, owner: str) -> RequestInBatch:
    shown_id = id_for(owner, track.key)
    return RequestInBatch(
        shown_id, track.state, track.steps_done, track.steps, track.rows, track.steps_skipped
    )


def _calls(group: Sequence[Track]) -> list[Call]:
    return [track.call for track in group if track.call is not None]


def _device_lost(track: Track) -> StoppedError:
    return StoppedError(f"request {track.id} was not finished before its device was lost")


def _expired(track: Track) -> ExpiredError:
    return ExpiredError(
        f"request {track.id} was not finished within its deadline of {track.deadline_s:g} s"
    )
