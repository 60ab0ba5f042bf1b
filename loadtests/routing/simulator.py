"""A fleet of step-batching replicas, simulated forward by forward. No Ray, no model, seeded.

Each replica steps as the engine does: the group goes on that holds the request with the least to
do for what it asked (Smith's rule, see `scheduling/policy.py`), unless another has been held
up for too long; a forward holds what is active of one group, and requests that do not fit among
the active rows wait, shortest first with ageing. The router in front sees of a replica only what it
would see in service: what it sent and saw end itself, and reports that are `report_period_s` apart.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from stepserve.engine.scheduling.policy import HOLD
from stepserve.routing.reports import Job, Report, StepCost

SIZES = ("64x64", "96x96", "128x128")
COSTS = {
    "64x64": StepCost(0.0160, 0.0015),
    "96x96": StepCost(0.0190, 0.0033),
    "128x128": StepCost(0.0230, 0.0058),
}
ROW_LIMIT = 32
PATIENCE = 1.0


class Router(Protocol):
    """Decides, and hears what a router hears."""

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        ...

    def sent(self, replica: int, job: Job) -> None:
        """It was sent there."""
        ...

    def ended(self, replica: int, job: Job) -> None:
        """It has ended there."""
        ...

    def reported(self, replica: int, report: Report) -> None:
        """A replica told about itself."""
        ...


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes."""

    at_s: float
    job: Job


def mixed_trace(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of requests of 4 to 100 steps (heavy-tailed), three sizes, n from 1 to 4."""
    chance = random.Random(seed)
    arrivals: list[Arrival] = []
    now_s = chance.expovariate(rate)
    while now_s < seconds:
        arrivals.append(Arrival(now_s, mixed_job(chance, len(arrivals))))
        now_s += chance.expovariate(rate)
    return arrivals


def mixed_job(chance: random.Random, number: int) -> Job:
    """One request of the mixed trace."""
    steps = min(int(4 * chance.paretovariate(0.9)), 100)
    size = chance.choices(SIZES, (5, 3, 2))[0]
    images = chance.choices((1, 2, 4), (8, 1, 1))[0]
    guided = 2 if chance.random() < 0.75 else 1
    return Job(str(number), size, size, images * guided, steps, images)


@dataclass
class Running:
    """A request on a replica, and what one of its steps takes alone."""

    job: Job
    arrived_s: float
    steps_left: int
    step_s: float

    @property
    def serial_s(self) -> float:
        """What all of its steps take alone."""
        return self.job.steps * self.step_s

    @property
    def rank(self) -> float:
        """Seconds left for its weight, which is one over what it asked for."""
        return self.steps_left * self.step_s * self.serial_s


@dataclass
class Replica:
    """One engine: active requests by group, and those that wait for rows."""

    costs: dict[str, StepCost]
    active: dict[str, list[Running]] = field(default_factory=dict)
    waiting: list[tuple[float, int, Running]] = field(default_factory=list)
    rows: int = 0
    busy: bool = False
    parked_s: dict[str, float] = field(default_factory=dict)
    stepping: str = ""

    def take(self, job: Job, number: int, now_s: float) -> None:
        """Queue a request: it starts as soon as its rows fit."""
        cost = self.costs[job.size]
        running = Running(job, now_s, job.steps, cost.fixed_s + cost.row_s * job.rows)
        heapq.heappush(self.waiting, (now_s + PATIENCE * running.serial_s, number, running))
        self._start_waiting(now_s)

    def begin_forward(self, now_s: float) -> float | None:
        """Seconds of the forward that begins now; None if there is nothing to do."""
        if not self.active:
            self.busy = False
            return None
        self.busy = True
        self.stepping = min(self.active, key=lambda group: self._urgency(group, now_s))
        return self._forward_s(self.stepping)

    def end_forward(self, now_s: float) -> list[Running]:
        """The forward is over: who is finished now?"""
        members = self.active[self.stepping]
        self.parked_s[self.stepping] = now_s
        for member in members:
            member.steps_left -= 1
        finished = [member for member in members if member.steps_left == 0]
        left = [member for member in members if member.steps_left > 0]
        self.rows -= sum(member.job.rows for member in finished)
        if left:
            self.active[self.stepping] = left
        else:
            del self.active[self.stepping]
        self._start_waiting(now_s)
        return finished

    def report(self) -> Report:
        """As a real replica tells it."""
        running = itertools.chain(*self.active.values(), (item[2] for item in self.waiting))
        jobs = tuple(replace(r.job, steps=r.steps_left) for r in running)
        return Report(jobs, self.costs, image_limit=10_000)

    def _urgency(self, group: str, now_s: float) -> tuple[bool, float]:
        """Least is next: what is overdue by when it was parked, then by rank."""
        parked_s = self.parked_s[group]
        if now_s - parked_s > HOLD * self._forward_s(group):
            return False, parked_s
        return True, min(member.rank for member in self.active[group])

    def _forward_s(self, group: str) -> float:
        members = self.active[group]
        cost = self.costs[members[0].job.size]
        return cost.fixed_s + cost.row_s * sum(member.job.rows for member in members)

    def _start_waiting(self, now_s: float) -> None:
        while self.waiting:
            job = self.waiting[0][2].job
            if self.rows and self.rows + job.rows > ROW_LIMIT:
                return
            self.rows += job.rows
            if job.group not in self.active:
                self.parked_s[job.group] = now_s
            self.active.setdefault(job.group, []).append(heapq.heappop(self.waiting)[2])


@dataclass(frozen=True)
class Served:
    """One finished request of a simulation."""

    job: Job
    arrived_s: float
    latency_s: float


def simulate(
    arrivals: Sequence[Arrival],
    routers: Sequence[Router],
    speeds: Sequence[float],
    report_period_s: float,
    set_clock: Callable[[float], None],
) -> list[Served]:
    """Serve all arrivals, dealt out to the routers in turn, on replicas of these speeds."""
    replicas = [Replica(_at_speed(speed)) for speed in speeds]
    simulation = Simulation(arrivals, routers, replicas, report_period_s)
    while len(simulation.served) < len(arrivals):
        set_clock(simulation.next_s)
        simulation.step()
    return simulation.served


class Simulation:
    """Events in the order of their time: arrivals, ends of forwards, reports."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        routers: Sequence[Router],
        replicas: Sequence[Replica],
        report_period_s: float,
    ) -> None:
        self.arrivals, self.routers, self.replicas = arrivals, routers, replicas
        self.report_period_s = report_period_s
        self.served: list[Served] = []
        self._owners: dict[str, Router] = {}
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[int, float], None], int]] = []
        for number, arrival in enumerate(arrivals):
            self._at(arrival.at_s, self._arrive, number)
        for number in range(len(replicas)):
            self._at(report_period_s * (number + 1) / len(replicas), self._report, number)

    @property
    def next_s(self) -> float:
        """When something happens next."""
        return self._events[0][0]

    def step(self) -> None:
        """Let it happen."""
        now_s, _, happen, number = heapq.heappop(self._events)
        happen(number, now_s)

    def _at(self, at_s: float, happen: Callable[[int, float], None], number: int) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen, number))

    def _arrive(self, number: int, now_s: float) -> None:
        job = self.arrivals[number].job
        router = self._owners[job.id] = self.routers[number % len(self.routers)]
        chosen = router.choose(job)
        router.sent(chosen, job)
        replica = self.replicas[chosen]
        replica.take(job, number, now_s)
        if not replica.busy:
            self._begin_forward(chosen, now_s)

    def _begin_forward(self, number: int, now_s: float) -> None:
        seconds = self.replicas[number].begin_forward(now_s)
        if seconds is not None:
            self._at(now_s + seconds, self._end_forward, number)

    def _end_forward(self, number: int, now_s: float) -> None:
        for running in self.replicas[number].end_forward(now_s):
            latency_s = now_s - running.arrived_s
            self.served.append(Served(running.job, running.arrived_s, latency_s))
            self._owners.pop(running.job.id).ended(number, running.job)
        self._begin_forward(number, now_s)

    def _report(self, number: int, now_s: float) -> None:
        report = self.replicas[number].report()
        for router in self.routers:
            router.reported(number, report)
        self._at(now_s + self.report_period_s, self._report, number)


def _at_speed(speed: float) -> dict[str, StepCost]:
    return {size: StepCost(c.fixed_s / speed, c.row_s / speed) for size, c in COSTS.items()}
