"""How long a forward took, on devices that compute at once and on those that compute later.

A CUDA device takes operations as fast as Python can launch them and works them off in its own time.
Meanwhile the engine wakes the tracks of the forward: what their schedulers launch waits behind it.
Only then does it wait for the forward to end, before it decides on the next. So the device goes on
while Python runs, the seconds that the cost model learns are the device's, and a newcomer never
waits behind more than one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from stepserve.engine.tracks.track import Clock


class ForwardTiming(Protocol):
    """One forward, from before its first operation.

    Args:
        started_s: when it was begun, on the engine's clock.
        runs_on: whether it may still run when its last operation was launched.
    """

    started_s: float
    runs_on: bool

    def launched(self) -> None:
        """Its last operation was launched."""
        ...

    def has_ended(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> float:
        """Return once it has ended, and how many seconds it took."""
        ...


class WallTiming:
    """Of a device that has ended when Python goes on, such as a CPU."""

    runs_on = False

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds = 0.0
        self.started_s = clock()

    def launched(self) -> None:
        """It has ended."""
        self._seconds = self._clock() - self.started_s

    def has_ended(self) -> bool:
        """It has."""
        return True

    def wait(self) -> float:
        """Seconds from its begin to its end."""
        return self._seconds


class CudaTiming:
    """Of the current CUDA device and stream, by events that the device itself marks."""

    runs_on = True

    def __init__(self, clock: Clock) -> None:
        # Blocking: whoever answers HTTP gets the core while the device works.
        self._start = torch.cuda.Event(enable_timing=True, blocking=True)
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)
        self._start.record()
        self.started_s = clock()

    def launched(self) -> None:
        """All of it lies before this mark."""
        self._end.record()

    def has_ended(self) -> bool:
        """Whether the device has come to the second mark."""
        ended: bool = self._end.query()
        return ended

    def wait(self) -> float:
        """Seconds between both marks, without what had to be waited for before."""
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1000


def timing_for(device: torch.device) -> Callable[[Clock], ForwardTiming]:
    """What times forwards on a device."""
    return CudaTiming if device.type == "cuda" else WallTiming
