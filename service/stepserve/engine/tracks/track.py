"""A request being worked on: a greenlet that runs an ordinary pipeline call and parks in it."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import greenlet
import torch

from stepserve.domain.errors import (
    CancelledError,
    ExpiredError,
    GenerationFailedError,
    InvalidRequestError,
    StepserveError,
    StoppedError,
    forget_frames,
)
from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState, is_terminal, move
from stepserve.domain.timings import Timings
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.guidance_interval import GuidanceInterval
from stepserve.engine.tracks.listener import Listener, tell
from stepserve.engine.tracks.step_cache import Decision, StepCache

logger = logging.getLogger(__name__)

Clock = Callable[[], float]
SKIPPED = object()
"""What a parked call gets instead of an output if it is skipped."""

_arrivals = itertools.count()


class Stage(StrEnum):
    """What a module is for, so that timings can be told apart.

    CONTROL is what runs beside the denoiser at its steps, such as a ControlNet.
    """

    ENCODE = "encode"
    CONTROL = "control"
    DENOISE = "denoise"
    DECODE = "decode"


@dataclass(frozen=True)
class Prediction:
    """What was last predicted of a request, and when.

    Args:
        at_s: on the engine's clock.
        seconds: from then until its end.
        forward_s: one forward of what was in flight.
    """

    at_s: float
    seconds: float
    forward_s: float


@dataclass(frozen=True)
class Phase:
    """Denoiser calls of one size, which a track makes before it goes on to another.

    Args:
        steps: denoiser calls expected, for estimates.
        size: what decides the cost of its steps, such as width and height. Calls of equal size are
            expected to take equally long for a row.
    """

    steps: int
    size: Hashable = None


class TrackGreenlet(greenlet.greenlet):
    """A greenlet that knows its track, so that a parkable module finds it."""

    track: Track


@dataclass(eq=False)
class Track:
    """A request in the engine: what is asked of it, and how far it is. Submitted when constructed.

    The engine resumes it with the outputs of module calls; it runs on until its next call, which
    is then in `call`, or until it ends. Whatever the pipeline raises ends this track and no other.

    Args:
        id: names it in messages, and among the tracks of its owner.
        rows: rows that each denoiser call will take, unless it is narrowed.
        phases: what it will do, one after the other; most tracks have one.
        images: images it makes, counted against the limit on those pending.
        run: the pipeline call; it runs in a greenlet on the engine thread.
        listener: hears the end, exactly once.
        variant: what the shared modules do for it and not for others, such as a set of adapters.
            Calls of different variants share no forward, unless both can be mixed.
        can_mix: whether its calls may share forwards with those of other variants that can be
            mixed as well. Asked whenever it matters: it may be known for sure only once the
            variant is loaded. It must not change after the first call.
        priority: 0 goes first; see `policy`.
        deadline_s: seconds after submission by which its images are of use, or None.
        isolated: its calls never share a forward.
        guidance_interval: which denoiser calls need only half of their rows, or None.
        step_cache: which denoiser calls are skipped; None: none.
        owner: who it is for. Tracks of several owners may have the same id.
        held: it may not start before `Engine.release` is told that what it needs is there. Until
            then it waits in line as any other.
        clock: the engine's.
    """

    id: str
    rows: int
    phases: tuple[Phase, ...]
    images: int
    run: Callable[[], Any]
    listener: Listener
    variant: Hashable = None
    can_mix: Callable[[], bool] = lambda: False
    priority: int = 1
    deadline_s: float | None = None
    isolated: bool = False
    guidance_interval: GuidanceInterval | None = None
    step_cache: StepCache | None = None
    owner: str = ""
    held: bool = False
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        self.key = RequestKey(self.id, self.owner)
        self.state = RequestState.QUEUED
        self.submitted_s = self.clock()
        self.started_s: float | None = None
        # When its first denoising step began.
        self.first_step_s: float | None = None
        self.stage_s: dict[Stage, float] = {}
        # Its part of the rows of each denoiser forward.
        self.shares: list[float] = []
        self.call: Call | None = None
        # Whether that call is skipped; None once it is known that it is not.
        self.decision: Decision | None = None
        self.parked_s = 0.0
        self.steps = sum(phase.steps for phase in self.phases)
        # With those that were skipped.
        self.steps_done = self.steps_skipped = 0
        # Orders tracks by their submission.
        self.arrival = next(_arrivals)
        # Seconds that it should take if nothing more came; what that was worth is learned.
        self.first_predicted_s: float | None = None
        # The same, predicted anew with each that came later.
        self.predicted: Prediction | None = None
        self._stopped_by: BaseException | None = None
        # Made on start: a greenlet belongs to the thread that makes it, which must be the engine's.
        self._greenlet: TrackGreenlet | None = None

    @property
    def ended(self) -> bool:
        """Whether the listener has heard the end."""
        return is_terminal(self.state)

    @property
    def sharing_variant(self) -> Hashable:
        """What keeps its calls apart from others'.

        That is its variant where it cannot be mixed, and itself if it is isolated.
        """
        variant = None if self.variant is None or self.can_mix() else self.variant
        return (variant, self.key) if self.isolated else variant

    @property
    def mixes_lengths(self) -> bool:
        """Whether its rows may share forwards with longer and shorter ones, where a module can."""
        return self.variant is None and not self.isolated

    @property
    def phase(self) -> int:
        """Which of its phases is under way; the last one once all steps are done."""
        done, last = self.steps_done, len(self.phases) - 1
        for number in range(last):
            done -= self.phases[number].steps
            if done < 0:
                return number
        return last

    @property
    def size(self) -> Hashable:
        """Of the steps that it makes now."""
        return self.phases[self.phase].size

    @property
    def kind(self) -> Hashable:
        """Requests of equal kind can share forwards."""
        return self.kind_of(self.size)

    def kind_of(self, size: Hashable) -> Hashable:
        """What its kind is while it makes steps of this size."""
        return size, self.sharing_variant

    def left_of(self, phase: int) -> int:
        """Denoiser calls still expected of that phase."""
        before = sum(earlier.steps for earlier in self.phases[:phase])
        steps = self.phases[phase].steps
        return min(max(before + steps - self.steps_done, 0), steps)

    @property
    def steps_left(self) -> int:
        """Denoiser calls still expected."""
        return max(self.steps - self.steps_done, 0)

    @property
    def rows_ahead(self) -> int:
        """The most rows that any of its denoiser calls will still take. Never grows."""
        interval = self.guidance_interval
        return self.rows if interval is None else interval.rows_from(self.steps_done)

    @property
    def expires_s(self) -> float:
        """When its deadline passes, on the engine's clock."""
        return self.submitted_s + (math.inf if self.deadline_s is None else self.deadline_s)

    def timings(self, now_s: float) -> Timings:
        """Seconds by stage up to this moment."""
        stage_s = self.stage_s
        return Timings(
            queue_s=(now_s if self.started_s is None else self.started_s) - self.submitted_s,
            first_step_s=(self.first_step_s or now_s) - self.submitted_s,
            encode_s=stage_s.get(Stage.ENCODE, 0.0),
            denoise_s=stage_s.get(Stage.DENOISE, 0.0) + stage_s.get(Stage.CONTROL, 0.0),
            decode_s=stage_s.get(Stage.DECODE, 0.0),
            total_s=now_s - self.submitted_s,
            batch_share=sum(self.shares) / len(self.shares) if self.shares else 1.0,
            denoiser_calls=self.steps_done,
            denoiser_calls_run=self.steps_done - self.steps_skipped,
        )

    def start(self) -> None:
        """Run up to the first module call."""
        self.state = move(self.state, RequestState.RUNNING)
        self.started_s = self.clock()
        tell(self.id, self.listener.started)
        self._greenlet = TrackGreenlet(self.run)
        self._greenlet.track = self
        self._run(self._greenlet.switch)

    def resume(self, output: Any) -> None:
        """Give the parked call its output and run up to the next one."""
        assert self._greenlet is not None
        self._run(partial(self._greenlet.switch, output))

    def skip(self) -> None:
        """Let the parked call predict its output, and run up to the next one."""
        if self.call is not None and self.call.method.stage == Stage.DENOISE:
            self.steps_done += 1
            self.steps_skipped += 1
        self.resume(SKIPPED)

    def throw(self, error: BaseException) -> None:
        """Raise `error` from the parked call; the pipeline may catch it and go on."""
        assert self._greenlet is not None
        self._run(partial(self._greenlet.throw, error))

    def stop(self, error: BaseException) -> None:
        """End the track with `error`, raised from the call it is parked at if it was started."""
        if self.ended:
            return
        self._stopped_by = error
        if self._greenlet is None:
            self._fail(error)
        else:
            self.throw(error)

    def abandon(self, error: BaseException) -> None:
        """Answer for a track whose greenlet cannot be reached: the engine's last resort."""
        if not self.ended:
            self._stopped_by = error
            self._fail(error)

    def park(self, call: Call, decision: Decision | None = None) -> Any:
        """Called inside the greenlet: hand `call` to the engine and wait for its output.

        With a decision, that may be SKIPPED.
        """
        if self._stopped_by is not None or self._greenlet is None:
            # The pipeline caught what should have ended it. This is no Exception: few catch it.
            raise greenlet.GreenletExit
        self.call, self.decision = call, decision
        gradients = torch.is_grad_enabled()
        try:
            return self._greenlet.parent.switch()
        finally:
            _restore_gradients(gradients)

    def _run(self, switch: Callable[[], Any]) -> None:
        self.call = self.decision = None
        # Grad mode belongs to the thread: what a pipeline sets must not leak to other tracks.
        gradients = torch.is_grad_enabled()
        try:
            result = switch()
        except BaseException as error:
            self._fail(error)
        else:
            self._settle(result)
        finally:
            _restore_gradients(gradients)

    def _settle(self, result: Any) -> None:
        """After a switch that raised nothing: parked, ended, or made to end."""
        if self.call is not None:
            self.parked_s = self.clock()
        elif self._stopped_by is not None:
            self._fail(self._stopped_by)
        elif isinstance(result, greenlet.GreenletExit):
            # Raised in a greenlet it comes back as a value.
            self._fail(result)
        else:
            self._end(RequestState.FINISHED)
            timings = self.timings(self.clock())
            tell(self.id, self.listener.finished, result, timings)

    def _fail(self, error: BaseException) -> None:
        error = self._stopped_by or error
        if isinstance(error, CancelledError | StoppedError):
            self._end(RequestState.CANCELLED)
        elif isinstance(error, ExpiredError):
            self._end(RequestState.EXPIRED)
        else:
            self._end(RequestState.FAILED)
            if not isinstance(error, InvalidRequestError):
                logger.warning("request %s failed", self.id, exc_info=error)
        forget_frames(error)
        tell(self.id, self.listener.failed, error, self.timings(self.clock()))

    def _end(self, state: RequestState) -> None:
        self.state = move(self.state, state)
        self.call = self.decision = None
        # Greenlet and track hold each other.
        self._greenlet = None


def _restore_gradients(enabled: bool) -> None:
    # Setting takes longer than asking, and it is rarely needed.
    if torch.is_grad_enabled() != enabled:
        torch.set_grad_enabled(enabled)


def as_stepserve_error(error: BaseException, request_id: str) -> StepserveError:
    """Any exception as one of our own, naming the request."""
    if isinstance(error, StepserveError):
        return error
    kind = type(error).__name__
    return GenerationFailedError(f"request {request_id} failed: {kind}: {error}")
