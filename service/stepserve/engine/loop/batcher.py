"""The heart: decide, run, settle. Single-threaded; the engine wraps a thread around it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepserve.domain.errors import ExpiredError, StoppedError, forget_frames
from stepserve.domain.reports import (
    BatchView,
    EndReport,
    ForwardReport,
    RequestInBatch,
    forward_for,
    id_for,
)
from stepserve.domain.requests import RequestKey
from stepserve.engine.calls.call import Call, CallKey
from stepserve.engine.calls.stacking import split, stack
from stepserve.engine.loop.device_loss import is_device_lost
from stepserve.engine.loop.observer import Observer
from stepserve.engine.loop.side_stream import SideStream
from stepserve.engine.loop.timing import ForwardTiming, WallTiming
from stepserve.engine.scheduling.cost import CostModel
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.estimator import CompletionEstimator
from stepserve.engine.scheduling.forecast import CompletionEstimate
from stepserve.engine.scheduling.policy import (
    SHORTEST_FIRST,
    Parked,
    Policy,
    next_to_start,
)
from stepserve.engine.scheduling.row_limits import RowLimits, is_out_of_memory
from stepserve.engine.tracks.track import Clock, Stage, Track

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Totals since the start. `busy_s - forward_s` is the time the engine itself took.

    `forwards`, `rows` and `calls` count what succeeded, and `padded_rows` what was run besides,
    for nobody, to fill forwards up; `retries` counts shared forwards that
    failed and were run again with fewer rows, and `out_of_memory` all for which memory ran out.
    `denoiser_rows` and `denoiser_s` are the part of rows and seconds that denoisers had.
    `unstacked` counts shapes whose row limit was lowered for good because sharing kept failing.
    """

    ticks: int = 0
    forwards: int = 0
    rows: int = 0
    padded_rows: int = 0
    calls: int = 0
    retries: int = 0
    out_of_memory: int = 0
    unstacked: int = 0
    denoiser_rows: int = 0
    denoiser_s: float = 0.0
    forward_s: float = 0.0
    busy_s: float = 0.0


SHOWN_FORWARDS = 64


@dataclass(frozen=True)
class Raised:
    """A forward raised this for one call."""

    error: BaseException


@dataclass(frozen=True)
class Launched:
    """A forward that the device has begun, for these calls of these tracks."""

    group: Sequence[Track]
    calls: Sequence[Call]
    padded_rows: int
    timing: ForwardTiming

    @property
    def rows(self) -> int:
        """Those that somebody wanted."""
        return sum(call.rows for call in self.calls)

    @property
    def stage(self) -> Stage:
        """What its time is counted as."""
        return Stage(self.calls[0].method.stage)


@dataclass(frozen=True)
class Decoding:
    """A forward of one track that runs aside; it is woken with `output` when that has ended."""

    track: Track
    launched: Launched
    output: Any


class Batcher:
    """Steps many tracks forward, one shared forward at a time.

    Args:
        row_limit: of one denoiser forward. Tracks are started while their rows fit beside those of
            their kind, so that every started one can take part in every step of it; later ones wait
            their turn. One that is larger than that is started alone. See `policy` for how many
            rows all kinds have together, and for when rows of less urgent tracks do not count.
        cost: learns what forwards take.
        clock: seconds, monotonic.
        on_ended: hears of each track once, after its listener did.
        policy: decides who goes next.
    """

    def __init__(
        self,
        row_limit: int = 32,
        cost: CostModel | None = None,
        clock: Clock = time.perf_counter,
        on_ended: Callable[[Track], None] = lambda track: None,
        policy: Policy = SHORTEST_FIRST,
    ) -> None:
        self.row_limit = row_limit
        self.cost = cost or CostModel()
        self.clock = clock
        self.counters = Counters()
        self.queued: list[Track] = []
        self.active: list[Track] = []
        self.row_limits = RowLimits()
        # Set for pipelines that cannot share: nobody starts before the one at work has ended.
        self.one_at_a_time = False
        self.outlook = CompletionEstimator(self.cost)
        self.latest_forwards: deque[ForwardReport] = deque(maxlen=SHOWN_FORWARDS)
        # May be appended to from any thread.
        self.observers: list[Observer] = []
        self.start_timing: Callable[[Clock], ForwardTiming] = WallTiming
        # Nothing runs any more, as each operation raises.
        self.device_lost = False
        # Forwards that may still run while their tracks are woken.
        self._running: list[Launched] = []
        # Where the device decodes beside steps, and what it decodes there, oldest first.
        self.aside: SideStream | None = None
        self._decoding: deque[Decoding] = deque()
        # What calls of a shape need to keep their bits, where that is not the same for all.
        self.adjust: Callable[[Call], Call] | None = None
        self._on_ended = on_ended
        self._policy = policy

    def add(self, track: Track) -> None:
        """Queue a new track; it starts at a tick that has room for its rows."""
        self.queued.append(track)

    def limit_rows(self, rows: int) -> None:
        """Let denoiser forwards have at most so many rows, and start tracks accordingly."""
        self.row_limit = rows
        self.row_limits.denoiser_rows = rows

    def stop_track(self, key: RequestKey, error: BaseException) -> None:
        """End a track by raising `error` from the call it is parked at, if it is there."""
        for track in [*self.active, *self.queued]:
            if track.work.key == key:
                track.stop(error)
        self._forget_ended()

    def release(self, key: RequestKey) -> None:
        """Let a held track start, if it is there."""
        for track in self.queued:
            if track.work.key == key:
                track.held = False

    def stop_all(self, make_error: Callable[[str], BaseException]) -> None:
        """End every track with the error that `make_error` makes for its request id."""
        for track in [*self.active, *self.queued]:
            track.stop(make_error(track.work.id))
        self._forget_ended()

    def tick(self) -> bool:
        """Start what fits, run one forward, wake its tracks. False if there was nothing to do."""
        started_s = self.clock()
        self._drop_expired(started_s)
        woken_any = self._wake_decoded()
        started_any = self._start_queued()
        group = self._decide()
        if group:
            forward_s = self.counters.forward_s
            self._advance(group)
            busy_s = self.clock() - started_s
            self.counters.ticks += 1
            self.counters.busy_s += busy_s
            self.outlook.tick_ended(busy_s, self.counters.forward_s - forward_s)
        elif self._decoding and not started_any:
            woken_any = self._wake_decoded(at_least=1)
        return started_any or woken_any or bool(group)

    def expected_finish_s(self, track: Track) -> float:
        """Seconds from now until a new track should be finished, given what is in hand."""
        seconds = self.prospect([*self.active, *self.queued, track]).finish_s[-1]
        return self.outlook.stretched_s(track, seconds)

    def prospect(self, tracks: Sequence[Track]) -> CompletionEstimate:
        """What becomes of these tracks if there are no others; the last one is the newcomer."""
        return self.outlook.forecast(tracks, self.row_limit, self.one_at_a_time)

    def finish_times_s(self, tracks: Sequence[Track]) -> Sequence[float]:
        """Seconds from now until each should be finished, if there were no others."""
        return self.prospect(tracks).finish_s

    def view(self, owner: str = "") -> BatchView:
        """The batch as `owner` may see it. May be called from any thread."""
        return BatchView(
            row_limit=self.row_limit,
            requests=tuple(_in_batch(track, owner) for track in [*self.active, *self.queued]),
            forwards=tuple(forward_for(owner, report) for report in self.latest_forwards.copy()),
        )

    def _drop_expired(self, now_s: float) -> None:
        expired = [track for track in (*self.active, *self.queued) if track.expires_s <= now_s]
        for track in expired:
            track.stop(_expired(track))
        if expired:
            self._forget_ended()

    def _start_queued(self) -> bool:
        started_any = False
        while track := self._next_to_start():
            self.queued.remove(track)
            self.active.append(track)
            track.start()
            # Those that ended before their first call leave their room to the next in line.
            self._forget_ended()
            started_any = True
        return started_any

    def _next_to_start(self) -> Track | None:
        """The queued track that is next in line, if there is room for it."""
        queued = [track for track in self.queued if not track.held]
        if not queued or (self.one_at_a_time and self.active):
            return None
        running = [self.outlook.demand(track) for track in self.active]
        if not self._has_room_for_any(queued, running):
            return None
        line = {self.outlook.demand(track): track for track in queued}
        first = next_to_start(list(line), running, self.row_limit, self._policy)
        return None if first is None else line[first]

    def _has_room_for_any(self, queued: Sequence[Track], running: Sequence[Demand]) -> bool:
        """Asked at every tick, and at saturation there is none: so when each is due comes later."""
        sizes = {(track.rows_ahead, track.work.priority, track.kind) for track in queued}
        return any(
            self._policy.has_room(Demand(0, rows, 0, kind, priority), running, self.row_limit)
            for rows, priority, kind in sizes
        )

    def _decide(self) -> list[Track]:
        decoding = {decoding.track for decoding in self._decoding}
        parked_at = [t for t in self.active if t.call is not None and t not in decoding]
        waiting = {self._adjusted(track): track for track in parked_at}
        parked = [
            Parked(call, track.parked_s, self.outlook.demand(track))
            for call, track in waiting.items()
        ]
        group = self._policy.pick(parked, self._expected_s, self.row_limits.limit)
        return [waiting[item.call] for item in group]

    def _adjusted(self, track: Track) -> Call:
        assert track.call is not None
        if self.adjust is not None:
            track.call = self.adjust(track.call)
        return track.call

    def _advance(self, group: Sequence[Track]) -> None:
        """Run one forward, and wake its tracks."""
        if self.aside is not None and _stage(group[0]) == Stage.DECODE:
            self._decode_aside(group[0], self.aside)
            return
        outputs = self._run(group)
        self._settle(group, outputs)
        self._await_running()

    def _decode_aside(self, track: Track, aside: SideStream) -> None:
        with aside.launching():
            (output,) = self._run([track])
        if isinstance(output, Raised):
            self._settle([track], [output])
        else:
            self._decoding.append(Decoding(track, self._running.pop(), output))

    def _wake_decoded(self, at_least: int = 0) -> bool:
        """Wake the tracks whose decoding has ended; wait for so many. Whether there was any."""
        woken = 0
        while self._decoding:
            if woken >= at_least and not self._decoding[0].launched.timing.has_ended():
                break
            decoding = self._decoding.popleft()
            self._account(decoding.launched)
            self._wake_aside(decoding.track, decoding.output)
            woken += 1
        if woken:
            self._forget_ended()
        return woken > 0

    def _wake_aside(self, track: Track, output: Any) -> None:
        # It may have been ended meanwhile.
        if self.aside is None or track.ended:
            return
        with self.aside.waking():
            track.resume(output)
        if not track.ended:
            self.aside.rejoin()

    def _run(self, group: Sequence[Track]) -> list[Any]:
        """One output for each track; if the shared forward raises, halves are tried apart."""
        try:
            return self._run_shared(group)
        except BaseException as error:
            failure = error
        # Not in the handler: what a part raises is not to be told as a consequence of this.
        if self.has_lost_device(failure):
            return [Raised(_device_lost(track.work.id)) for track in group]
        if is_out_of_memory(failure):
            return self._run_with_less(group, failure)
        return [Raised(failure)] if len(group) == 1 else self._run_apart(group, failure)

    def has_lost_device(self, failure: BaseException) -> bool:
        """Whether the device cannot be used any more, by this failure or by one before."""
        if not self.device_lost and is_device_lost(failure):
            logger.error("the device cannot be used any more: %s", failure)
            self.device_lost = True
        return self.device_lost

    def _run_shared(self, group: Sequence[Track]) -> list[Any]:
        calls = _calls(group)
        method = calls[0].method
        rows = [call.rows for call in calls]
        padded_rows = self._padded_rows(calls)
        args, kwargs = stack(calls, padded_rows)
        calls[0].enter()
        timing = self.start_timing(self.clock)
        output = method.run(*args, **kwargs)
        timing.launched()
        padding = padded_rows - sum(rows)
        outputs = split(output, rows, padding, row_lists=bool(method.rules.row_lists))
        launched = Launched(group, calls, padding, timing)
        self._note_steps(launched)
        # What comes after encoding wants its outcome at once, and after decoding, unless aside.
        at_once = launched.stage is Stage.ENCODE or (
            launched.stage is Stage.DECODE and self.aside is None
        )
        if timing.runs_on and not at_once:
            self._running.append(launched)
        else:
            self._account(launched)
        return outputs

    def _await_running(self) -> None:
        """Until the device has ended all that was launched."""
        running, self._running = self._running, []
        for launched in running:
            self._account(launched)

    def _report(self, launched: Launched, seconds: float) -> ForwardReport:
        """Before anything is learned from it, as it says what was predicted."""
        # In the engine's own time, so nothing else is worked out here.
        pairs = zip(launched.group, launched.calls, strict=True)
        requests = tuple((track.work.key, call.rows) for track, call in pairs)
        call, rows = launched.calls[0], launched.rows
        shape = call.key.shape
        return ForwardReport(
            number=self.counters.forwards,
            stage=call.method.stage,
            module=call.method.name,
            requests=requests,
            rows=rows,
            padded_rows=launched.padded_rows,
            row_limit=self.row_limit,
            seconds=seconds,
            expected_s=self.cost.predict(shape, rows) if self.cost.knows(shape) else None,
            ended_s=self.clock(),
        )

    def _padded_rows(self, calls: Sequence[Call]) -> int:
        """With how many rows a forward of these calls is run."""
        rows = sum(call.rows for call in calls)
        padded_rows = calls[0].method.padded_rows(rows)
        return padded_rows if self.row_limits.allows(calls[0], padded_rows) else rows

    def _run_with_less(self, group: Sequence[Track], failure: BaseException) -> list[Any]:
        """Memory ran out: without rows that only fill up if there were any, else in halves."""
        calls = _calls(group)
        padded_rows = self._padded_rows(calls)
        self._make_room(calls, padded_rows, failure)
        if self._padded_rows(calls) < padded_rows:
            self.counters.retries += 1
            return self._run(group)
        return [Raised(failure)] if len(group) == 1 else self._run_halves(group)

    def _run_apart(self, group: Sequence[Track], failure: BaseException) -> list[Any]:
        forget_frames(failure)
        outputs = self._run_halves(group)
        if not any(isinstance(output, Raised) for output in outputs):
            # No call is to blame, so sharing is.
            rows = max(sum(call.rows for call in _calls(half)) for half in _halves(group))
            self.counters.unstacked += self.row_limits.lower(_calls(group)[0], rows, failure)
        return outputs

    def _run_halves(self, group: Sequence[Track]) -> list[Any]:
        self.counters.retries += 1
        return [output for half in _halves(group) for output in self._run(half)]

    def _make_room(self, calls: Sequence[Call], rows: int, failure: BaseException) -> None:
        self.counters.out_of_memory += 1
        # First of all: the frames hold what the forward had made, which takes memory.
        forget_frames(failure)
        # A call of its own has as many rows as it has, whatever the limit.
        if rows > calls[0].rows:
            self.row_limits.halve(calls[0], rows, failure)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _settle(self, group: Sequence[Track], outputs: Sequence[Any]) -> None:
        for track, output in zip(group, outputs, strict=True):
            if isinstance(output, Raised):
                track.throw(output.error)
            else:
                track.resume(output)
        self._forget_ended()

    def _note_steps(self, launched: Launched) -> None:
        """What the tracks should know of a forward before they go on."""
        if launched.stage is not Stage.DENOISE:
            return
        rows = launched.rows
        self.counters.denoiser_rows += rows
        for track, call in zip(launched.group, launched.calls, strict=True):
            track.steps_done += 1
            track.shares.append(call.rows / rows)
            track.first_step_s = track.first_step_s or launched.timing.started_s
            self.outlook.step_ended(track, call)

    def _account(self, launched: Launched) -> None:
        """A forward has ended: tell, and learn from it."""
        seconds, rows, call = launched.timing.wait(), launched.rows, launched.calls[0]
        self.counters.forwards += 1
        report = self._report(launched, seconds)
        self.latest_forwards.append(report)
        for observer in self.observers:
            observer.forward_ended(report)
        for track in launched.group:
            stage_s = track.stage_s
            stage_s[launched.stage] = stage_s.get(launched.stage, 0.0) + seconds
        if launched.stage is Stage.DENOISE:
            self.counters.denoiser_s += seconds
        self.cost.observe(call.key.shape, rows, seconds)
        self.row_limits.succeeded(call, rows)
        self.counters.padded_rows += launched.padded_rows
        self.counters.rows += rows
        self.counters.calls += len(launched.calls)
        self.counters.forward_s += seconds

    def _expected_s(self, key: CallKey, rows: int) -> float:
        return self.cost.predict(key.shape, rows)

    def _forget_ended(self) -> None:
        ended = [track for track in (*self.active, *self.queued) if track.ended]
        if ended:
            self.active = [track for track in self.active if not track.ended]
            self.queued = [track for track in self.queued if not track.ended]
        for track in ended:
            now_s = self.clock()
            self.outlook.track_ended(track, now_s)
            self._on_ended(track)
            report = _end_report(track, now_s)
            for observer in self.observers:
                observer.request_ended(report)


def _in_batch(track: Track, owner: str) -> RequestInBatch:
    work, shown_id = track.work, id_for(owner, track.work.key)
    return RequestInBatch(shown_id, track.state, track.steps_done, work.steps, work.rows)


def _end_report(track: Track, now_s: float) -> EndReport:
    work = track.work
    return EndReport(
        key=work.key,
        state=track.state,
        timings=track.timings(now_s),
        images=work.images,
        steps_left=track.steps_left,
        has_deadline=work.deadline_s is not None,
        ended_s=now_s,
    )


def _stage(track: Track) -> str | None:
    return None if track.call is None else track.call.method.stage


def _halves(group: Sequence[Track]) -> tuple[Sequence[Track], Sequence[Track]]:
    middle = len(group) // 2
    return group[:middle], group[middle:]


def _calls(group: Sequence[Track]) -> list[Call]:
    return [track.call for track in group if track.call is not None]


def _device_lost(request_id: str) -> StoppedError:
    return StoppedError(f"request {request_id} was not finished before its device was lost")


def _expired(track: Track) -> ExpiredError:
    return ExpiredError(
        f"request {track.work.id} was not finished within its deadline of "
        f"{track.work.deadline_s:g} s"
    )
