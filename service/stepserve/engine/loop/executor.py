"""Runs what the scheduler has picked: one forward for calls that share it, or parts if it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepserve.domain.errors import forget_frames
from stepserve.engine.calls.call import Call, enter, longest
from stepserve.engine.calls.stacking import share_out, stack
from stepserve.engine.device_errors import is_device_lost, is_out_of_memory
from stepserve.engine.loop.timing import ForwardTiming
from stepserve.engine.scheduling.row_limits import RowLimits
from stepserve.engine.tracks.track import Clock, Stage

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """Totals since the start. `busy_s - forward_s` is the time that the engine itself took.

    `forwards`, `rows` and `calls` count what succeeded, and `padded_rows` what was run besides,
    for nobody, to fill forwards up; `retries` counts shared forwards that
    failed and were run again with fewer rows, and `out_of_memory` all for which memory ran out.
    `denoiser_rows` and `denoiser_s` are the part of rows and seconds that denoisers had.
    `unstacked` counts shapes whose row limit was lowered for good because sharing kept failing.
    """

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


# Compared by identity: it stands for one run on the device.
@dataclass(frozen=True, eq=False)
class Forward:
    """A forward that the device has begun, for calls with equal keys.

    Args:
        padded_rows: rows that were run besides, to fill the forward up.
    """

    calls: Sequence[Call]
    padded_rows: int
    timing: ForwardTiming

    @property
    def rows(self) -> int:
        """Rows of the calls, without padding."""
        return sum(call.rows for call in self.calls)

    @property
    def stage(self) -> Stage:
        """What its time is counted as."""
        return Stage(self.calls[0].method.stage)


@dataclass(frozen=True)
class Done:
    """What a forward gave for one of its calls."""

    output: Any
    forward: Forward


@dataclass(frozen=True)
class Raised:
    """A forward raised this for one call."""

    error: BaseException


class Executor:
    """Runs groups of calls with equal keys, and knows nothing of requests.

    A group is the name of a method, tensors and plain values, so that the forward may as well run
    elsewhere. Rows are filled up to the method's row counts. If a shared forward raises, its halves
    are tried apart, so that nobody pays for another's call; what was learned of memory and of
    sharing is in `row_limits`.
    """

    def __init__(
        self,
        row_limits: RowLimits,
        counters: Counters,
        clock: Clock,
        start_timing: Callable[[Clock], ForwardTiming],
    ) -> None:
        # Nothing runs any more, as each operation raises.
        self.device_lost = False
        self.row_limits = row_limits
        self._counters = counters
        self._clock = clock
        self._start_timing = start_timing

    def run(self, calls: Sequence[Call]) -> list[Done | Raised]:
        """One result for each call; the device may still be busy on the outputs.

        Args:
            calls: with equal keys, whose rows fit into one forward.
        """
        try:
            return self._run_shared(calls)
        except BaseException as error:
            failure = error
        # Not in the handler: what a part raises is not to be told as a consequence of this.
        if self.has_lost_device(failure):
            return [Raised(failure)] * len(calls)
        if is_out_of_memory(failure):
            return self._run_with_less(calls, failure)
        return [Raised(failure)] if len(calls) == 1 else self._run_apart(calls, failure)

    def has_lost_device(self, failure: BaseException) -> bool:
        """Whether the device cannot be used any more, by this failure or by one before."""
        if not self.device_lost and is_device_lost(failure):
            logger.error("the device cannot be used any more: %s", failure)
            self.device_lost = True
        return self.device_lost

    def _run_shared(self, calls: Sequence[Call]) -> list[Done | Raised]:
        method = longest(calls).method
        padded_rows = self._padded_rows(calls)
        padding = padded_rows - sum(call.rows for call in calls)
        arguments = stack(calls, padded_rows)
        enter(calls, padding)
        timing = self._start_timing(self._clock)
        output = method.run(*arguments[0], **arguments[1])
        timing.launched()
        outputs = share_out(calls, arguments, output, padding)
        forward = Forward(calls, padding, timing)
        return [Done(output, forward) for output in outputs]

    def _padded_rows(self, calls: Sequence[Call]) -> int:
        """With how many rows a forward of these calls is run."""
        rows, call = sum(call.rows for call in calls), longest(calls)
        padded_rows = call.method.padded_rows(rows)
        return padded_rows if self.row_limits.allows(call, padded_rows) else rows

    def _run_with_less(self, calls: Sequence[Call], failure: BaseException) -> list[Done | Raised]:
        """Memory ran out: without rows that only fill up if there were any, else in halves."""
        padded_rows = self._padded_rows(calls)
        self._free_memory(calls, padded_rows, failure)
        if self._padded_rows(calls) < padded_rows:
            self._counters.retries += 1
            return self.run(calls)
        return [Raised(failure)] if len(calls) == 1 else self._run_halves(calls)

    def _run_apart(self, calls: Sequence[Call], failure: BaseException) -> list[Done | Raised]:
        forget_frames(failure)
        results = self._run_halves(calls)
        if not any(isinstance(result, Raised) for result in results):
            # No call is to blame, so sharing is.
            rows = max(sum(call.rows for call in half) for half in _halves(calls))
            self._counters.unstacked += self.row_limits.lower(longest(calls), rows, failure)
        return results

    def _run_halves(self, calls: Sequence[Call]) -> list[Done | Raised]:
        self._counters.retries += 1
        return [result for half in _halves(calls) for result in self.run(half)]

    def _free_memory(self, calls: Sequence[Call], rows: int, failure: BaseException) -> None:
        self._counters.out_of_memory += 1
        # First of all: the frames hold what the forward had made, which takes memory.
        forget_frames(failure)
        # A call of its own has as many rows as it has, whatever the limit.
        call = longest(calls)
        if rows > call.rows:
            self.row_limits.halve(call, rows, failure)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _halves(calls: Sequence[Call]) -> tuple[Sequence[Call], Sequence[Call]]:
    middle = len(calls) // 2
    return calls[:middle], calls[middle:]
