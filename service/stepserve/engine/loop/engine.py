"""The engine: one thread that batches, and what other threads may ask of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from stepserve.domain.errors import (
    CancelledError,
    GenerationFailedError,
    NotReadyError,
    StoppedError,
)
from stepserve.domain.requests import RequestKey
from stepserve.engine.loop.accounting import Observer
from stepserve.engine.loop.batcher import Batcher
from stepserve.engine.loop.execution import DEFAULT_EXECUTION, Execution
from stepserve.engine.loop.executor import Counters
from stepserve.engine.scheduling.admission import (
    Ending,
    Load,
    check_deadline,
    check_promises,
    check_room,
    load_of,
)
from stepserve.engine.scheduling.cost import CostModel
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.estimator import CompletionEstimator
from stepserve.engine.scheduling.forecast import CompletionEstimate
from stepserve.engine.tracks.listener import tell
from stepserve.engine.tracks.track import Clock, Prediction, Track

logger = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_WAIT_S = 0.5
DRAIN_RETRY_S = 5.0
STALE_S = 30.0
# What an idle engine learned long ago may be wrong, though hardly by more than this.
STALE_FACTOR = 10.0
LOWEST_PRIORITY = 19
MOST_MEASURED_ROWS = 64


@dataclass(frozen=True)
class EngineOptions:
    """Limits and manners of one engine.

    Args:
        max_rows: most rows of one shared denoiser forward, or None if that is to be measured; see
            `Engine.limit_rows`.
        max_pending_images: images in flight beyond which new requests are refused.
        threads: torch threads of the engine, or None for torch's default.
        niceness: how far the engine thread steps back behind the threads that answer HTTP.
        gradients: whether pipelines may compute gradients, as some kinds of guidance do. Without,
            every operation is a few percent cheaper.
    """

    max_rows: int | None = None
    max_pending_images: int = 64
    threads: int | None = None
    niceness: int = 0
    gradients: bool = False

    @property
    def row_ceiling(self) -> int:
        """Most rows of one shared denoiser forward, whatever is measured."""
        return MOST_MEASURED_ROWS if self.max_rows is None else self.max_rows


class Engine:
    """Runs submitted work. Every accepted piece of work ends in exactly one listener call.

    All methods may be called from any thread, and by listeners; only `stop` may not be called by
    `Listener.accepted`, which runs under the engine's lock. `row_limit` is the most rows of one
    shared denoiser forward, as configured or measured, and `row_ceiling` the most it may become.

    Args:
        clock: seconds, monotonic.
        idle_wait_s: how long an engine without work rests before it shows a sign of life.
    """

    def __init__(
        self,
        options: EngineOptions | None = None,
        cost: CostModel | None = None,
        clock: Clock = time.perf_counter,
        idle_wait_s: float = IDLE_WAIT_S,
    ) -> None:
        self._idle_wait_s = idle_wait_s
        self.options = options or EngineOptions()
        self.row_limit = self.row_ceiling = self.options.row_ceiling
        self._clock = clock
        self._estimator = CompletionEstimator(cost)
        # May be appended to from any thread.
        self._observers: list[Observer] = []
        self.batcher = self._batcher_for(DEFAULT_EXECUTION)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        # Guarded by the lock: what submitting threads and the engine thread share. A listener that
        # hears it was accepted may call the engine again, hence reentrant.
        self._lock = threading.RLock()
        self._nothing_in_flight = threading.Condition(self._lock)
        self._in_flight: set[Track] = set()
        self._open = True
        self._last_in_flight_s = -math.inf
        self._prepare: Callable[[], None] = lambda: None
        self._one_at_a_time = False
        # Written by the engine thread only.
        self._running = True
        self._last_sign_of_life_s = clock()

    def start(self, prepare: Callable[[], Execution] = Execution) -> None:
        """Start the engine thread, and wait until `prepare` has run on it, ahead of any work.

        What it returns says how forwards run from then on. Raises what `prepare` raises.
        """
        prepared: Future[None] = Future()
        self._prepare = partial(_answer, prepared, partial(self._set_up, prepare))
        self._thread.start()
        prepared.result()

    def submit(self, track: Track) -> int:
        """Accept a new track and return how many requests are ahead of it.

        Raises:
            ServerFullError: too many images are in flight already, or with this track too some in
                flight would miss their deadlines.
            UnmeetableDeadlineError: it would not be finished within its own deadline.
            NotReadyError: the engine is draining or has stopped.
        """
        # All under the lock: `accepted` comes before `started`, and what is accepted is among the
        # commands before `stop` can put its own behind them.
        with self._lock:
            if not self._open:
                raise NotReadyError("the server is draining and takes no new work", DRAIN_RETRY_S)
            in_flight = self._not_ended()
            self._check_room(in_flight, track.images)
            estimate = self._forecast([*in_flight, track])
            self._check_deadlines(in_flight, track, estimate)
            self._let_in(in_flight, track, estimate)
        return len(in_flight)

    def cancel(self, key: RequestKey) -> None:
        """End a request at its next park; does nothing if it is unknown or ended already."""
        self.fail(key, CancelledError(f"request {key.id} was cancelled"))

    def release(self, key: RequestKey) -> None:
        """Let held work start; does nothing if it is unknown or ended already."""
        self._commands.put(lambda: self.batcher.release(key))

    def fail(self, key: RequestKey, error: BaseException) -> None:
        """End work with an error; does nothing if it is unknown or ended already."""
        self._commands.put(lambda: self.batcher.stop_track(key, error))

    def load(self) -> Load:
        """Work in flight: everything accepted and not yet ended."""
        with self._lock:
            return load_of(self._endings(self._not_ended()))

    def estimator_of(self, key: RequestKey) -> tuple[int, float] | None:
        """How many requests in flight came before this one, and when it should end, in seconds.

        None if it is not in flight.
        """
        with self._lock:
            tracks = self._not_ended()
            seconds = self._forecast(tracks).finish_s
        for position, (track, expected_s) in enumerate(zip(tracks, seconds, strict=True)):
            if track.key == key:
                return position, expected_s
        return None

    def demands(self) -> dict[RequestKey, Demand]:
        """What is left to do for each request in flight."""
        with self._lock:
            return {t.key: self._estimator.demand(t) for t in self._not_ended()}

    def step_costs(self) -> dict[Hashable, tuple[float, float]]:
        """What was learned of steps; see `CompletionEstimator.step_costs`."""
        return self._estimator.step_costs()

    def run_shares(self) -> dict[str, float]:
        """What was learned of step caches; see `CompletionEstimator.run_shares`."""
        return self._estimator.run_shares()

    def serial_s(self, track: Track) -> float:
        """Seconds that `track` should take if there were no other; 0 while nothing is learned."""
        return self._forecast([track]).finish_s[0]

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two ticks, and wait for what it returns.

        For work that needs the thread's torch settings and must not meet a forward. Not from a
        listener. Raises what the function raises.

        Raises:
            NotReadyError: the engine is not running.
        """
        answer: Future[T] = Future()
        with self._lock:
            if not self._open or not self._thread.is_alive():
                raise NotReadyError("the engine is not running", DRAIN_RETRY_S)
            self._commands.put(partial(_answer, answer, function))
        return answer.result()

    def limit_rows(self, rows: int) -> None:
        """Let shared denoiser forwards have at most so many rows from the next tick on."""
        self.row_limit = limit = min(rows, self.row_ceiling)
        self._commands.put(lambda: self.batcher.scheduler.limit_rows(limit))

    def observe(self, observer: Observer) -> None:
        """Report the forwards and ends that come from now on to `observer`."""
        self._observers.append(observer)

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self.batcher.counters

    def silent_s(self) -> float:
        """Seconds since the engine thread last showed a sign of life.

        Infinite if it ended, or has lost its device: then all that it could do is fail.
        """
        if not self._thread.is_alive() or self.batcher.executor.device_lost:
            return float("inf")
        return self._clock() - self._last_sign_of_life_s

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no new work, finish what is in flight within `drain_s`, cancel the rest, end.

        Returns when the engine thread has ended, unless a listener calls it on that very thread.
        """
        with self._lock:
            self._open = False
            if self._thread.ident is None:
                self._close()
                return
            if threading.current_thread() is not self._thread:
                self._nothing_in_flight.wait_for(lambda: not self._in_flight, drain_s)
        self._commands.put(self._end)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _set_up(self, prepare: Callable[[], Execution]) -> None:
        execution = prepare()
        self.row_ceiling = execution.row_ceiling or self.row_ceiling
        if execution.row_limit is not None:
            self.row_limit = min(execution.row_limit, self.row_ceiling)
        self._one_at_a_time = execution.one_at_a_time
        self.batcher = self._batcher_for(execution)

    def _batcher_for(self, execution: Execution) -> Batcher:
        return Batcher(
            self.row_limit,
            execution,
            self._estimator,
            self._clock,
            on_ended=self._forget,
            observers=self._observers,
        )

    def _main(self) -> None:
        try:
            self._settle_in()
            # These modes belong to the thread, not to the greenlet: once, at the root.
            with torch.no_grad() if self.options.gradients else torch.inference_mode():
                self._prepare()
                while self._running:
                    self._turn()
        finally:
            self._close()

    def _settle_in(self) -> None:
        if self.options.niceness:
            self._step_back()
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)

    def _step_back(self) -> None:
        # On Linux niceness belongs to a thread, and threads it starts (OpenMP's) inherit it.
        try:
            thread = threading.get_native_id()
            wanted = os.getpriority(os.PRIO_PROCESS, thread) + self.options.niceness
            os.setpriority(os.PRIO_PROCESS, thread, min(wanted, LOWEST_PRIORITY))
        except OSError as error:
            logger.warning("the engine thread keeps its priority: %s", error)

    def _turn(self) -> None:
        """Hear what others want, do one tick, and rest if there was nothing to do."""
        try:
            self._take_commands(wait=False)
            if not self._running:
                return
            worked = self.batcher.tick()
            self._last_sign_of_life_s = self._clock()
            if not worked:
                self._take_commands(wait=True)
        except Exception as error:
            # Ours, as pipelines and listeners are caught elsewhere. Everyone is told, and the
            # engine goes on with what comes next.
            logger.exception("internal engine error")
            lost = self.batcher.executor.has_lost_device(error)
            self.batcher.stop_all(_stopped if lost else partial(_engine_failed, error))

    def _take_commands(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            if wait:
                self._commands.get(timeout=self._idle_wait_s)()
            while True:
                self._commands.get_nowait()()

    def _end(self) -> None:
        self._running = False

    def _close(self) -> None:
        """Answer everything that is still in flight, whatever happened before."""
        with self._lock:
            self._open = False
        self._running = False
        try:
            self._take_commands(wait=False)
            self.batcher.stop_all(_stopped)
        except Exception:
            logger.exception("internal engine error while stopping")
        with self._lock:
            left_over = list(self._in_flight)
        for track in left_over:
            track.abandon(_stopped(track.id))
            self._forget(track)

    def _forget(self, track: Track) -> None:
        with self._lock:
            self._in_flight.discard(track)
            self._last_in_flight_s = self._clock()
            if not self._in_flight:
                self._nothing_in_flight.notify_all()

    def _not_ended(self) -> list[Track]:
        """What is in flight, in the order of arrival so that equal histories have equal forecasts.

        Not what is about to be forgotten: who was told of an end may send the next work at once.
        """
        return sorted(
            (track for track in self._in_flight if not track.ended), key=lambda track: track.arrival
        )

    def _check_room(self, in_flight: Sequence[Track], images: int) -> None:
        limit = self.options.max_pending_images
        if sum(track.images for track in in_flight) + images > limit:
            check_room(self._endings(in_flight), images, limit)

    def _check_deadlines(
        self, in_flight: Sequence[Track], track: Track, estimate: CompletionEstimate
    ) -> None:
        now_s, estimator = track.submitted_s, self._estimator
        check_promises(
            estimate, estimator.lateness, [other.expires_s - now_s for other in in_flight]
        )
        deadline_s = track.deadline_s
        if deadline_s is None or not estimator.knows(track):
            return
        # It learns from nobody but those that it lets in.
        doubt = STALE_FACTOR if self._is_stale(now_s) else 1.0
        check_deadline(estimate, estimator.lateness, deadline_s, doubt)

    def _is_stale(self, now_s: float) -> bool:
        """Whether the last work in flight is so long ago that what was learned may have changed."""
        return not self._in_flight and now_s - self._last_in_flight_s >= STALE_S

    def _let_in(
        self, in_flight: Sequence[Track], track: Track, estimate: CompletionEstimate
    ) -> None:
        now_s, forward_s = track.submitted_s, estimate.forward_s
        for other, seconds in zip([*in_flight, track], estimate.finish_s, strict=True):
            other.predicted = Prediction(now_s, seconds, forward_s)
        expected_s = self._estimator.stretched_s(track, estimate.finish_s[-1])
        self._in_flight.add(track)
        tell(track.id, track.listener.accepted, len(in_flight), expected_s)
        self._commands.put(lambda: self.batcher.scheduler.add(track))

    def _forecast(self, tracks: Sequence[Track]) -> CompletionEstimate:
        """What becomes of these tracks if there are no others; the last one is the newcomer."""
        return self._estimator.forecast(tracks, self.row_limit, self._one_at_a_time)

    def _endings(self, tracks: Sequence[Track]) -> list[Ending]:
        seconds = self._forecast(tracks).finish_s
        return [Ending(s, t.images) for s, t in zip(seconds, tracks, strict=True)]


def _answer(answer: Future[T], function: Callable[[], T]) -> None:
    try:
        answer.set_result(function())
    except Exception as error:
        answer.set_exception(error)


def _stopped(request_id: str) -> BaseException:
    return StoppedError(f"request {request_id} was not finished before the server stopped")


def _engine_failed(error: Exception, request_id: str) -> BaseException:
    return GenerationFailedError(f"request {request_id} failed in the engine: {error!r}")
