"""The heart: decide, run, settle. Single-threaded; the engine wraps a thread around it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.states import is_terminal
from service.engine.admission import RemainingWork, backlog_s
from service.engine.call import CallKey
from service.engine.coalesce import split, stack
from service.engine.cost import CostModel
from service.engine.policy import Parked, pick
from service.engine.track import Stage, Track

Clock = Callable[[], float]


@dataclass
class Counters:
    """Totals since the start. `busy_s - forward_s` is the time the engine itself took."""

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

    error: Exception


class Batcher:
    """Steps many tracks forward, one shared forward at a time.

    Args:
        max_active_rows: tracks are started while their denoiser rows fit, so that every started
            track can take part in every step; later ones wait their turn.
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
        self._denoiser_row_s = self.cost.unknown_s

    def add(self, track: Track) -> None:
        """Queue a new track; it starts at the next tick that has room for its rows."""
        self.queued.append(track)

    def stop_track(self, request_id: str, error: BaseException) -> None:
        """End a track by raising `error` from the call it is parked at. Unknown ids are ignored."""
        for track in [*self.active, *self.queued]:
            if track.work.id == request_id:
                track.throw(error, self.clock())
        self._forget_ended()

    def tick(self) -> bool:
        """Start what fits, run one forward, wake its tracks. False if there was nothing to do."""
        started_s = self.clock()
        self._start_queued()
        group = self._decide()
        if group:
            outputs = self._run(group)
            self._settle(group, outputs)
            self.counters.ticks += 1
            self.counters.busy_s += self.clock() - started_s
        return bool(group)

    def backlog_s(self) -> float:
        """Seconds that the denoiser steps of all work in hand should take."""
        tracks = [*self.active, *self.queued]
        per_row_s = self._denoiser_row_s
        return backlog_s(RemainingWork(t.steps_left, t.work.rows, per_row_s) for t in tracks)

    def _start_queued(self) -> None:
        rows = sum(track.work.rows for track in self.active)
        while self.queued:
            rows += self.queued[0].work.rows
            if self.active and rows > self.max_active_rows:
                return
            track = self.queued.popleft()
            self.active.append(track)
            track.start(self.clock())
        self._forget_ended()

    def _decide(self) -> list[Track]:
        now_s = self.clock()
        by_sequence = {t.call.sequence: t for t in self.active if t.call is not None}
        parked = [Parked(t.call, t.parked_s) for t in by_sequence.values() if t.call is not None]
        return [by_sequence[p.call.sequence] for p in pick(parked, now_s, self._expected_s)]

    def _run(self, group: Sequence[Track]) -> list[Any]:
        """One output for each track; if the shared forward raises, halves are tried apart."""
        calls = [track.call for track in group if track.call is not None]
        rows = [call.rows for call in calls]
        args, kwargs = stack(calls)
        started_s = self.clock()
        try:
            output = calls[0].method.run(*args, **kwargs)
        except Exception as error:
            return self._run_halves(group, error)
        self._account(group, sum(rows), self.clock() - started_s)
        return split(output, rows)

    def _run_halves(self, group: Sequence[Track], error: Exception) -> list[Any]:
        if len(group) == 1:
            return [Raised(error)]
        self.counters.retries += 1
        middle = len(group) // 2
        return [*self._run(group[:middle]), *self._run(group[middle:])]

    def _settle(self, group: Sequence[Track], outputs: Sequence[Any]) -> None:
        for track, output in zip(group, outputs, strict=True):
            if isinstance(output, Raised):
                track.throw(output.error, self.clock())
            else:
                track.resume(output, self.clock())
        self._forget_ended()

    def _account(self, group: Sequence[Track], rows: int, seconds: float) -> None:
        first = group[0].call
        assert first is not None
        stage = Stage(first.method.stage)
        for track in group:
            clockwork = track.clockwork
            clockwork.stage_s[stage] = clockwork.stage_s.get(stage, 0.0) + seconds
            if stage is Stage.DENOISE and track.call is not None:
                track.steps_done += 1
                clockwork.shares.append(track.call.rows / rows)
                self._denoiser_row_s = seconds / rows
        self.cost.observe(first.key.shape, rows, seconds)
        self.counters.forwards += 1
        self.counters.rows += rows
        self.counters.calls += len(group)
        self.counters.forward_s += seconds

    def _expected_s(self, key: CallKey, rows: int) -> float:
        return self.cost.predict(key.shape, rows)

    def _forget_ended(self) -> None:
        tracks = [*self.active, *self.queued]
        for track in tracks:
            if is_terminal(track.state):
                self._on_ended(track)
        self.active = [t for t in self.active if not is_terminal(t.state)]
        self.queued = deque(t for t in self.queued if not is_terminal(t.state))
