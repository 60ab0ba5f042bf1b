"""When requests in hand will be finished, if nothing more comes. Pure.

A coarse simulation, from one finished request to the next: requests of one group step together,
groups share the device by time according to their priorities, and as some finish, the steps of the
rest get shorter and queued ones are started. It takes about n log n for n requests, so that it can
be asked at every submission.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from service.engine.policy import patience

ForwardCost = Callable[[Hashable, int], float]
RowLimit = Callable[[Hashable], int]


@dataclass(frozen=True)
class Job:
    """What is left to do for one request.

    Args:
        group: requests of equal group share forwards.
        shape: what a step costs; see `CostModel`.
        steps: denoiser calls left.
        other_s: seconds it takes apart from them.
        rank: orders those that were not started.
    """

    group: Hashable
    shape: Hashable
    rows: int
    steps: int
    priority: int
    other_s: float
    rank: float
    started: bool


@dataclass(frozen=True)
class Device:
    """What forwards cost, and how many rows fit."""

    cost_of: ForwardCost
    limit_of: RowLimit
    max_active_rows: int


@dataclass
class Group:
    """Jobs that step together. `progress` counts its steps; each job ends at one of them."""

    shape: Hashable
    progress: float = 0.0
    rows: int = 0
    priorities: dict[int, int] = field(default_factory=dict)
    ends: list[tuple[float, int]] = field(default_factory=list)

    def add(self, number: int, job: Job) -> None:
        """One more takes part from here on."""
        heapq.heappush(self.ends, (self.progress + job.steps, number))
        self.rows += job.rows
        self.priorities[job.priority] = self.priorities.get(job.priority, 0) + 1

    def remove_first(self, jobs: Sequence[Job]) -> int:
        """The number of the job that ends first, which is then gone."""
        _, number = heapq.heappop(self.ends)
        job = jobs[number]
        self.rows -= job.rows
        self.priorities[job.priority] -= 1
        return number

    @property
    def weight(self) -> float:
        """Its claim to the device's time: that of its most urgent member."""
        return 1 / patience(min(p for p, count in self.priorities.items() if count))

    def step_s(self, device: Device) -> float:
        """Device seconds for one step of everyone in it, in several forwards if need be."""
        limit = max(device.limit_of(self.shape), 1)
        forwards = max(self.rows / limit, 1.0)
        return device.cost_of(self.shape, min(self.rows, limit)) * forwards

    @property
    def steps_to_next_end(self) -> float:
        """Steps until the first of its jobs ends."""
        return max(self.ends[0][0] - self.progress, 0.0)


def finish_times_s(jobs: Sequence[Job], device: Device) -> list[float]:
    """Seconds from now at which each job is done, in the order given."""
    return _Forecast(jobs, device).run()


class _Forecast:
    def __init__(self, jobs: Sequence[Job], device: Device) -> None:
        self.jobs, self.device = jobs, device
        self.now_s = 0.0
        self.active_rows = 0
        self.groups: dict[Hashable, Group] = {}
        self.finished_s = [math.nan] * len(jobs)
        waiting = [number for number, job in enumerate(jobs) if not job.started]
        self.waiting = sorted(waiting, key=lambda number: jobs[number].rank, reverse=True)

    def run(self) -> list[float]:
        for number, job in enumerate(self.jobs):
            if job.started:
                self._start(number)
        self._start_waiting()
        while self.groups:
            self._end_next()
            self._start_waiting()
        return self.finished_s

    def _start(self, number: int) -> None:
        job = self.jobs[number]
        self.active_rows += job.rows
        self.groups.setdefault(job.group, Group(job.shape)).add(number, job)

    def _start_waiting(self) -> None:
        limit = self.device.max_active_rows
        while self.waiting:
            rows = self.jobs[self.waiting[-1]].rows
            if self.active_rows and self.active_rows + rows > limit:
                return
            self._start(self.waiting.pop())

    def _end_next(self) -> None:
        """Go on to the moment when the next job ends."""
        weights = sum(group.weight for group in self.groups.values())
        step_s = {
            key: group.step_s(self.device) * weights / group.weight
            for key, group in self.groups.items()
        }
        first = min(self.groups, key=lambda key: self.groups[key].steps_to_next_end * step_s[key])
        passed_s = self.groups[first].steps_to_next_end * step_s[first]
        for key, group in self.groups.items():
            group.progress += passed_s / step_s[key]
        number = self.groups[first].remove_first(self.jobs)
        if not self.groups[first].ends:
            del self.groups[first]
        job = self.jobs[number]
        self.active_rows -= job.rows
        self.now_s += passed_s + job.other_s
        self.finished_s[number] = self.now_s
