"""When requests in hand will be finished, if nothing more comes. Pure.

A coarse simulation, from one finished request to the next: requests of one group step together,
groups share the device by time according to their priorities (or the shortest goes first, where the
policy has it so), and as some finish, the steps of the rest get shorter and queued ones are
started. It takes about n log n for n requests, so that it can be asked at every submission.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from stepserve.engine.scheduling.policy import HOLD, SHORTEST_S, front_of, patience

# Of a job that waits: it ends in a forward that it leads, or takes part in.
LEAST_LEFT, ENDED = 0.01, 1e-6
SMALLEST_S = 1e-9

ForwardCost = Callable[[Hashable, int], float]
RowLimit = Callable[[Hashable], int]


class Job(NamedTuple):
    """What is left to do for one request. A tuple, as hundreds are made at each submission.

    Args:
        group: requests of equal group share forwards.
        shape: what a step costs; see `CostModel`.
        steps: denoiser calls left.
        other_s: seconds it takes apart from them.
        rank: orders those that were not started.
        arrives_s: seconds from now at which it is submitted; only of one that was not started.
        step_s: seconds of a step of it alone. This and the next are for `SHORTEST_FIRST` only.
        serial_s: what all its steps take alone, those that are done included.
    """

    group: Hashable
    shape: Hashable
    rows: int
    steps: int
    priority: int
    other_s: float
    rank: float
    started: bool
    arrives_s: float = 0.0
    step_s: float = 0.0
    serial_s: float = 0.0


@dataclass(frozen=True)
class Device:
    """What forwards cost, how many rows fit, and whether groups go on one after another.

    Args:
        max_group_rows: rows of one group at work, as far as there are several jobs in it.
        max_active_rows: rows of all groups at work, as far as there are several jobs.
    """

    cost_of: ForwardCost
    limit_of: RowLimit
    max_group_rows: int
    max_active_rows: int
    in_turns: bool = False


@dataclass
class Group:
    """Jobs that step together. `progress` counts its steps; each job ends at one of them.

    Its claim to the device's time is that of its most urgent member: `weight`. `pace_s` is what
    one step takes, by that claim. Both are kept while the same jobs are in it; see `settle`.
    """

    shape: Hashable
    device: Device
    progress: float = 0.0
    rows: int = 0
    priorities: dict[int, int] = field(default_factory=dict)
    ends: list[tuple[float, int]] = field(default_factory=list)
    weight: float = 0.0
    pace_s: float = 0.0
    changed: bool = True

    def add(self, number: int, job: Job) -> None:
        """One more takes part from here on."""
        heapq.heappush(self.ends, (self.progress + job.steps, number))
        self.rows += job.rows
        self.priorities[job.priority] = self.priorities.get(job.priority, 0) + 1
        self.changed = True

    def remove_first(self, jobs: Sequence[Job]) -> int:
        """The number of the job that ends first, which is then gone."""
        _, number = heapq.heappop(self.ends)
        job = jobs[number]
        self.rows -= job.rows
        self.priorities[job.priority] -= 1
        self.changed = True
        return number

    def settle(self) -> None:
        """Work out what a step takes, if other jobs are in it than before."""
        if self.changed:
            self.weight = 1 / patience(min(p for p, count in self.priorities.items() if count))
            self.pace_s = self._step_s() / self.weight
            self.changed = False

    @property
    def claim_to_next_end_s(self) -> float:
        """Seconds until the first of its jobs ends, by its claim."""
        return max(self.ends[0][0] - self.progress, 0.0) * self.pace_s

    def go_on(self, claim_s: float) -> None:
        """Take the steps that its claim allows."""
        self.progress += claim_s / self.pace_s

    def _step_s(self) -> float:
        """Device seconds for one step of everyone in it, in several forwards if need be."""
        limit = max(self.device.limit_of(self.shape), 1)
        forwards = max(self.rows / limit, 1.0)
        return self.device.cost_of(self.shape, min(self.rows, limit)) * forwards


def finish_times_s(jobs: Sequence[Job], device: Device) -> list[float]:
    """Seconds from now at which each job is done, in the order given."""
    forecast = _InTurns if device.in_turns else _Forecast
    return forecast(jobs, device).run()


class CompletionEstimate:
    """What becomes of the jobs in hand and of a newcomer, which is the last of `jobs`.

    Args:
        finish_s: when each is done, in seconds from now, if the newcomer is let in.
    """

    def __init__(self, jobs: Sequence[Job], device: Device) -> None:
        self._jobs, self._device = jobs, device
        self.finish_s = tuple(finish_times_s(jobs, device))

    @property
    def forward_s(self) -> float:
        """The longest forward that those in hand and the newcomer may have."""
        rows: dict[Hashable, int] = {}
        for job in self._jobs:
            rows[job.shape] = rows.get(job.shape, 0) + job.rows
        return max(self._forward_s(shape, wanted) for shape, wanted in rows.items())

    def without_s(self) -> list[float]:
        """When each in hand is done if the newcomer is not let in."""
        return finish_times_s(self._jobs[:-1], self._device)

    def alone(self) -> CompletionEstimate:
        """What becomes of the newcomer if nothing is in hand."""
        return CompletionEstimate(self._jobs[-1:], self._device)

    def later_s(self, wait_s: float) -> float:
        """How long the newcomer takes if it comes in `wait_s` seconds, and nobody before it."""
        newcomer = self._jobs[-1]
        later = newcomer._replace(rank=newcomer.rank + wait_s, arrives_s=wait_s)
        return finish_times_s([*self._jobs[:-1], later], self._device)[-1] - wait_s

    def _forward_s(self, shape: Hashable, rows: int) -> float:
        return self._device.cost_of(shape, min(rows, self._device.limit_of(shape)))


class _Forecast:
    def __init__(self, jobs: Sequence[Job], device: Device) -> None:
        self.jobs, self.device = jobs, device
        self.now_s = 0.0
        self.active_rows = 0
        self.rows_of: dict[Hashable, int] = {}
        self.groups: dict[Hashable, Group] = {}
        self.finished_s = [math.nan] * len(jobs)
        queued = [number for number, job in enumerate(jobs) if not job.started]
        coming = [number for number in queued if jobs[number].arrives_s > 0]
        self.coming = sorted(coming, key=lambda number: jobs[number].arrives_s, reverse=True)
        # By group, the next to be started last.
        self.waiting: dict[Hashable, list[int]] = {}
        for number in sorted(queued, key=lambda number: jobs[number].rank, reverse=True):
            if jobs[number].arrives_s <= 0:
                self.waiting.setdefault(jobs[number].group, []).append(number)

    def run(self) -> list[float]:
        for number, job in enumerate(self.jobs):
            if job.started:
                self._start(number)
        self._start_waiting()
        while self._at_work or self.coming:
            self._go_on()
            self._start_waiting()
        return self.finished_s

    @property
    def _at_work(self) -> bool:
        return bool(self.groups)

    def _start(self, number: int) -> None:
        job = self.jobs[number]
        self._take_rows(job, job.rows)
        group = self.groups.get(job.group)
        if group is None:
            group = self.groups[job.group] = Group(job.shape, self.device)
        group.add(number, job)

    def _take_rows(self, job: Job, rows: int) -> None:
        self.active_rows += rows
        self.rows_of[job.group] = self.rows_of.get(job.group, 0) + rows

    def _start_waiting(self) -> None:
        limit, group_limit = self.device.max_active_rows, self.device.max_group_rows
        heads = {group: line[-1] for group, line in self.waiting.items()}
        while heads:
            group, number = min(heads.items(), key=lambda head: self.jobs[head[1]].rank)
            rows = self.jobs[number].rows
            if self.active_rows and self.active_rows + rows > limit:
                return
            of_group = self.rows_of.get(group, 0)
            if of_group and of_group + rows > group_limit:
                del heads[group]
                continue
            self._start(self.waiting[group].pop())
            if self.waiting[group]:
                heads[group] = self.waiting[group][-1]
            else:
                del self.waiting[group], heads[group]

    def _go_on(self) -> None:
        """Go on to the moment when the next job ends, or the next one comes."""
        for group in self.groups.values():
            group.settle()
        weights = sum(group.weight for group in self.groups.values())
        key, claim_s = self._next_end()
        comes_s = self.jobs[self.coming[-1]].arrives_s if self.coming else math.inf
        if self.now_s + claim_s * weights < comes_s or not self.coming:
            self._pass(claim_s, weights)
            self._end_first(key)
            return
        if weights:
            self._pass(max(comes_s - self.now_s, 0.0) / weights, weights)
        self.now_s = max(self.now_s, comes_s)
        self._let_in(self.coming.pop())

    def _next_end(self) -> tuple[Hashable, float]:
        """The group whose job ends first, and when by its claim."""
        first, first_s = None, math.inf
        for key, group in self.groups.items():
            claim_s = group.claim_to_next_end_s
            if claim_s < first_s:
                first, first_s = key, claim_s
        return first, first_s

    def _pass(self, claim_s: float, weights: float) -> None:
        self.now_s += claim_s * weights
        for group in self.groups.values():
            group.go_on(claim_s)

    def _end_first(self, key: Hashable) -> None:
        group = self.groups[key]
        number = group.remove_first(self.jobs)
        if not group.ends:
            del self.groups[key]
        job = self.jobs[number]
        self._take_rows(job, -job.rows)
        self.now_s += job.other_s
        self.finished_s[number] = self.now_s

    def _let_in(self, number: int) -> None:
        job = self.jobs[number]
        line = self.waiting.setdefault(job.group, [])
        line.insert(sum(self.jobs[other].rank > job.rank for other in line), number)


class _InTurns(_Forecast):
    """The shortest goes first, as `policy.SHORTEST_FIRST` has it.

    The others wait, but for the steps that they get when they are overdue.
    """

    def __init__(self, jobs: Sequence[Job], device: Device) -> None:
        super().__init__(jobs, device)
        self.active: list[int] = []
        self.left = [float(job.steps) for job in jobs]
        self.patience = [patience(job.priority) for job in jobs]
        self.weight = [
            1 / (patient * max(job.serial_s, SHORTEST_S))
            for job, patient in zip(jobs, self.patience, strict=True)
        ]
        self.step_rank = [
            job.step_s / weight for job, weight in zip(jobs, self.weight, strict=True)
        ]

    @property
    def _at_work(self) -> bool:
        return bool(self.active)

    def _start(self, number: int) -> None:
        self._take_rows(self.jobs[number], self.jobs[number].rows)
        self.active.append(number)

    def _go_on(self) -> None:
        comes_s = self.jobs[self.coming[-1]].arrives_s if self.coming else math.inf
        if self.active:
            chosen, step_s = self._next_forward()
            steps = min(self.left[number] for number in chosen)
            others, share = self._overdue(set(chosen))
            seconds = steps * step_s * (1 + share)
            part = min(max((comes_s - self.now_s) / max(seconds, SMALLEST_S), 0.0), 1.0)
            self.now_s += part * seconds
            for number in chosen:
                self.left[number] -= part * steps
            for number, forward_s in others:
                gone = part * seconds / (HOLD * self.patience[number] * forward_s)
                self.left[number] = max(self.left[number] - gone, LEAST_LEFT)
            if part == 1.0:
                self._end(chosen)
                return
        if self.coming:
            self.now_s = max(self.now_s, comes_s)
            self._let_in(self.coming.pop())

    def _next_forward(self) -> tuple[list[int], float]:
        """Who takes part in the next forwards, and what each of them takes."""
        ranked = sorted((self.left[n] * self.step_rank[n], n) for n in self.active)
        lead = self.jobs[ranked[0][1]]
        limit = self.device.limit_of(lead.shape)
        line: list[int] = []
        rows = 0
        for _, number in ranked:
            job = self.jobs[number]
            if job.group == lead.group and (not line or rows + job.rows <= limit):
                line.append(number)
                rows += job.rows
        count = front_of(
            [self.jobs[number].rows for number in line],
            [self.weight[number] for number in line],
            sum(self.weight[number] for number in self.active),
            partial(self.device.cost_of, lead.shape),
        )
        front = line[:count]
        rows = sum(self.jobs[number].rows for number in front)
        return front, self.device.cost_of(lead.shape, rows)

    def _overdue(self, chosen: set[int]) -> tuple[list[tuple[int, float]], float]:
        """Those who wait, with the seconds of their forwards, and their share of the time."""
        rows: dict[Hashable, int] = {}
        for number in self.active:
            job = self.jobs[number]
            rows[job.group] = rows.get(job.group, 0) + job.rows
        waiting, shares = [], {}
        for number in self.active:
            if number in chosen:
                continue
            job = self.jobs[number]
            limit = self.device.limit_of(job.shape)
            waiting.append((number, self.device.cost_of(job.shape, min(rows[job.group], limit))))
            shares[job.group] = 1 / (HOLD * self.patience[number])
        return waiting, min(sum(shares.values()), 1.0)

    def _end(self, chosen: Sequence[int]) -> None:
        for number in chosen:
            if self.left[number] <= ENDED:
                self.active.remove(number)
                self._take_rows(self.jobs[number], -self.jobs[number].rows)
                self.now_s += self.jobs[number].other_s
                self.finished_s[number] = self.now_s
