"""The heart: decide, run, settle. Single-threaded; the engine wraps a thread around it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.engine.admission import RemainingWork, backlog_s
from service.engine.call import Call, CallKey
from service.engine.coalesce import split, stack
from service.engine.cost import CostModel
from service.engine.policy import Parked, pick
from service.engine.row_limits import RowLimits
from service.engine.track import Clock, Stage, Track, forget_frames


@dataclass
class Counters:
    """Totals since the start. `busy_s - forward_s` is the time the engine itself took.

    `forwards`, `rows` and `calls` count what succeeded; `retries` counts shared forwards that
    failed and were run again in halves.
    """

    ticks: int = 0
    forwards: int = 0
    rows: int = 0
    calls: int = 0
    retries: int = 0
    forward_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Raised:
    """A forward raised this for one call."""

    error: BaseException


class Batcher:
    """Steps many tracks forward, one shared forward at a time.

    Args:
        max_active_rows: tracks are started while their denoiser rows fit, so that every started
            track can take part in every step; later ones wait their turn. One that is larger than
            that is started alone.
        cost: learns what forwards take.
        clock: seconds, monotonic.
        on_ended: hears of each track once, after its listener did.
    """

    def __init__(
        self,
        max_active_rows: int = 32,
        cost: CostModel | None = None,
        clock: Clock = time.perf_counter,
        on_ended: Callable[[Track], None] = lambda track: None,
    ) -> None:
        self.max_active_rows = max_active_rows
        self.cost = cost or CostModel()
        self.clock = clock
        self.counters = Counters()
        self.queued: deque[Track] = deque()
        self.active: list[Track] = []
        self._on_ended = on_ended
        self._row_limits = RowLimits()
        self._denoiser_row_s = self.cost.unknown_s

    def add(self, track: Track) -> None:
        """Queue a new track; it starts at the next tick that has room for its rows."""
        self.queued.append(track)

    def stop_track(self, request_id: str, error: BaseException) -> None:
        """End a track by raising `error` from the call it is parked at. Unknown ids are ignored."""
        for track in [*self.active, *self.queued]:
            if track.work.id == request_id:
                track.stop(error)
        self._forget_ended()

    def stop_all(self, make_error: Callable[[str], BaseException]) -> None:
        """End every track with the error that `make_error` makes for its request id."""
        for track in [*self.active, *self.queued]:
            track.stop(make_error(track.work.id))
        self._forget_ended()

    def tick(self) -> bool:
        """Start what fits, run one forward, wake its tracks. False if there was nothing to do."""
        started_s = self.clock()
        started_any = self._start_queued()
        group = self._decide()
        if group:
            outputs = self._run(group)
            self._settle(group, outputs)
            self.counters.ticks += 1
            self.counters.busy_s += self.clock() - started_s
        return started_any or bool(group)

    def backlog_s(self) -> float:
        """Seconds that the denoiser steps of all work in hand should take."""
        tracks = [*self.active, *self.queued]
        per_row_s = self._denoiser_row_s
        return backlog_s(RemainingWork(t.steps_left, t.work.rows, per_row_s) for t in tracks)

    def _start_queued(self) -> bool:
        started_any = False
        while self.queued and self._has_room(self.queued[0]):
            track = self.queued.popleft()
            self.active.append(track)
            track.start()
            # Those that ended before their first call leave their room to the next in line.
            self._forget_ended()
            started_any = True
        return started_any

    def _has_room(self, track: Track) -> bool:
        rows = sum(active.work.rows for active in self.active)
        return not self.active or rows + track.work.rows <= self.max_active_rows

    def _decide(self) -> list[Track]:
        waiting = {t.call: t for t in self.active if t.call is not None}
        parked = [Parked(call, track.parked_s) for call, track in waiting.items()]
        return [waiting[p.call] for p in pick(parked, self._expected_s, self._row_limits.limit)]

    def _run(self, group: Sequence[Track]) -> list[Any]:
        """One output for each track; if the shared forward raises, halves are tried apart."""
        try:
            return self._run_shared(group)
        except BaseException as error:
            failure = error
        # Not in the handler: what a half raises is not to be told as a consequence of this.
        return [Raised(failure)] if len(group) == 1 else self._run_halves(group, failure)

    def _run_shared(self, group: Sequence[Track]) -> list[Any]:
        calls = _calls(group)
        rows = [call.rows for call in calls]
        args, kwargs = stack(calls)
        calls[0].enter()
        started_s = self.clock()
        output = calls[0].method.run(*args, **kwargs)
        seconds = self.clock() - started_s
        outputs = split(output, rows)
        self._account(group, sum(rows), seconds)
        return outputs

    def _run_halves(self, group: Sequence[Track], failure: BaseException) -> list[Any]:
        self.counters.retries += 1
        middle = len(group) // 2
        halves = group[:middle], group[middle:]
        outputs = [output for half in halves for output in self._run(half)]
        if not any(isinstance(output, Raised) for output in outputs):
            # No call is to blame, so sharing is.
            rows = max(sum(call.rows for call in _calls(half)) for half in halves)
            self._row_limits.lower(_calls(group)[0], rows, failure)
        forget_frames(failure)
        return outputs

    def _settle(self, group: Sequence[Track], outputs: Sequence[Any]) -> None:
        for track, output in zip(group, outputs, strict=True):
            if isinstance(output, Raised):
                track.throw(output.error)
            else:
                track.resume(output)
        self._forget_ended()

    def _account(self, group: Sequence[Track], rows: int, seconds: float) -> None:
        calls = _calls(group)
        stage = Stage(calls[0].method.stage)
        for track, call in zip(group, calls, strict=True):
            clockwork = track.clockwork
            clockwork.stage_s[stage] = clockwork.stage_s.get(stage, 0.0) + seconds
            if stage is Stage.DENOISE:
                track.steps_done += 1
                clockwork.shares.append(call.rows / rows)
                clockwork.first_step_s = clockwork.first_step_s or self.clock() - seconds
                self._denoiser_row_s = seconds / rows
        self.cost.observe(calls[0].key.shape, rows, seconds)
        self.counters.forwards += 1
        self.counters.rows += rows
        self.counters.calls += len(group)
        self.counters.forward_s += seconds

    def _expected_s(self, key: CallKey, rows: int) -> float:
        return self.cost.predict(key.shape, rows)

    def _forget_ended(self) -> None:
        ended = [track for track in (*self.active, *self.queued) if track.ended]
        if ended:
            self.active = [track for track in self.active if not track.ended]
            self.queued = deque(track for track in self.queued if not track.ended)
        for track in ended:
            self._on_ended(track)


def _calls(group: Sequence[Track]) -> list[Call]:
    return [track.call for track in group if track.call is not None]
