"""What one router knows of the replicas, and when each would finish a request.

A replica steps everything it has in turns, one step of each request a cycle; requests of one group
(one size, and one set of adapters where it mixes none) share the forward. So a request of `t` steps
is finished after `t` cycles, and a cycle costs each group that still steps its fixed seconds, and
each request that still steps the seconds of its rows:

    finish(t) = sum over groups  fixed_s * min(t, longest request of the group)
              + sum over requests  row_s * rows * min(t, its steps)

The request itself adds its rows, and its group's fixed seconds only for the cycles that the group
would not have run anyway: it is cheaper where its group is being stepped already. One that goes on
at another size is counted as if it did both at once, which is right in the end.

Reports of the replicas are up to a second old. In between, the ledger adds what this router has
sent and takes away what it saw end, and lets the rest melt as time passes: a replica does a second
of work in a second.

One that has work and shows no progress may hang. Nobody can tell for how long yet; the best guess
is as long again as it has been silent, which is added to `finish`: others are asked meanwhile, and
nothing is asked of it for ever only because what was sent there would have melted by now.

The sums are kept at a few numbers of steps, for all replicas in one array, so that a decision among
a thousand of them is some array operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cachetools import FIFOCache
from numpy.typing import NDArray

from stepserve.routing.reports import ALONE, Job, LaterSteps, Report, StepCost

# Between these numbers of steps, `finish` is read off a straight line.
STEPS_AT = np.array([0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024], float)
UNKNOWN_COST = StepCost(0.02, 0.005)
MOST_COLUMNS = 64
# Later than anything: where all are full, the soonest of them says when there is room again.
FULL_S = 1e9
# How far scores are blurred where all of the work is other routers'.
JITTER = 0.6
# What a second of all others together counts beside a second of the request itself.
CONCERN = 0.6
# A report, its way here, and a step: less is no silence.
NEWS_WITHIN_S = 3.0

Floats = NDArray[np.float64]
ReplicaKey = Hashable


@dataclass
class Account:
    """What is known of one replica.

    Args:
        jobs: what it has in flight, by request id.
        since: when this router sent what the latest report may not list yet.
        ended: when this router saw end what the latest report may still list.
        own: requests that this router sent.
        news_s: when it last showed progress; never while it has no work.
    """

    report: Report = field(default_factory=Report)
    jobs: dict[str, Job] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    news_s: float = math.inf

    def hear(self, report: Report, late_s: float) -> None:
        """Believe a report, but for what was sent or ended after `late_s`."""
        told = {job.id: job for job in report.jobs}
        self.ended = {name: at_s for name, at_s in self.ended.items() if at_s > late_s}
        self.since = {
            name: at_s for name, at_s in self.since.items() if name not in told and at_s > late_s
        }
        sent = {name: self.jobs[name] for name in self.since}
        self.jobs = {name: job for name, job in told.items() if name not in self.ended} | sent
        self.own &= self.jobs.keys()
        self.report = report


class Ledger:
    """Expected finish times on all replicas.

    Args:
        clock: seconds that only grow.
        report_delay_s: how old a report may be when it arrives: what was sent within this time
            before is kept although the report does not list it.
    """

    def __init__(
        self, clock: Callable[[], float], report_delay_s: float = 1.0, seed: int | None = None
    ) -> None:
        self._clock = clock
        self._chance = np.random.default_rng(seed)
        self._report_delay_s = report_delay_s
        self._accounts: dict[ReplicaKey, Account] = {}
        self._keys: list[ReplicaKey] = []
        self._places: dict[ReplicaKey, int] = {}
        self._resize(0)

    def set_replicas(self, keys: Sequence[ReplicaKey]) -> None:
        """These replicas are there now; what is known of those that stay is kept."""
        if self._keys == list(keys):
            return
        self._keys = list(keys)
        self._accounts = {key: self._accounts.get(key, Account()) for key in keys}
        self._places = {key: place for place, key in enumerate(keys)}
        self._resize(len(keys))
        for key in keys:
            self._write(key)

    def note_report(self, key: ReplicaKey, report: Report) -> None:
        """A replica told what it has in flight."""
        account = self._accounts.get(key)
        if account is not None:
            before = len(account.jobs), len(account.own)
            has_news = report != account.report
            account.hear(report, self._clock() - self._report_delay_s)
            self._jobs += len(account.jobs) - before[0]
            self._own_jobs += len(account.own) - before[1]
            self._write(key)
            if has_news or not account.jobs:
                self._note_news(key)

    def note_sent(self, key: ReplicaKey, job: Job) -> None:
        """This router sent a request to a replica."""
        account = self._accounts.get(key)
        if account is None or job.id in account.jobs:
            return
        self._settle(key)
        self._add(self._places[key], job)
        account.since[job.id] = self._clock()
        account.jobs[job.id] = job
        if len(account.jobs) == 1:
            self._note_news(key)
        account.own.add(job.id)
        self._jobs += 1
        self._own_jobs += 1

    def note_ended(self, key: ReplicaKey, job_id: str) -> None:
        """A request that this router sent has ended."""
        account = self._accounts.get(key)
        if account is None or job_id not in account.jobs:
            return
        ended = account.jobs.pop(job_id)
        account.since.pop(job_id, None)
        account.ended[job_id] = self._clock()
        self._jobs -= 1
        self._own_jobs -= job_id in account.own
        account.own.discard(job_id)
        # Its seconds have melted by now, more or less; the next report says it exactly.
        self._images[self._places[key]] -= ended.images
        self._note_news(key)
        if not account.jobs:
            self._write(key)

    def has_in_flight(self, key: ReplicaKey, job_id: str) -> bool:
        """Whether a replica is thought to be running a request."""
        account = self._accounts.get(key)
        return account is not None and job_id in account.jobs

    def finish_s(self, job: Job) -> Floats:
        """Seconds until each replica, in the order of `set_replicas`, would finish `job`."""
        return self._finish_and_harm_s(job)[0]

    def _finish_and_harm_s(self, job: Job) -> tuple[Floats, Floats]:
        """Seconds until `job` would be finished, and by which all others together get later."""
        lower, upper, share = _between(job.all_steps)
        # What is in flight melts by a second a second.
        done_s = self._clock() - self._written_s
        left = np.clip(1 - done_s / np.maximum(self._ahead_s[:, -1], 1e-9), 0, 1)
        ahead_s = (1 - share) * self._ahead_s[:, lower] + share * self._ahead_s[:, upper]
        beside = (1 - share) * self._steps_beside[:, lower] + share * self._steps_beside[:, upper]
        own_s = np.sum([self._own_s(job.rows, part) for part in job.parts], axis=0)
        finish_s = ahead_s * left + own_s + self._silent_s()
        return finish_s, own_s / job.all_steps * beside * left

    def _own_s(self, rows: int, part: LaterSteps) -> Floats:
        """Seconds that steps of one size add on each replica."""
        fixed_s, row_s = self._costs(part.size)
        alone = np.maximum(1 - self._longest(part.group) / max(part.steps, 1), 0)
        own_s: Floats = (row_s * rows + fixed_s * alone) * part.steps
        return own_s

    def _silent_s(self) -> Floats:
        """Seconds for which each replica has had work without showing any progress."""
        return np.maximum(self._clock() - self._news_s - NEWS_WITHIN_S, 0.0)

    def _note_news(self, key: ReplicaKey) -> None:
        """A replica got on just now; one without work has nothing to show."""
        has_work = bool(self._accounts[key].jobs)
        self._accounts[key].news_s = self._clock() if has_work else math.inf
        self._news_s[self._places[key]] = self._accounts[key].news_s

    def has_room(self, job: Job) -> NDArray[np.bool_]:
        """Which replicas would let `job` in; an empty one takes anything."""
        fits = self._images + job.images <= self._limits
        return np.asarray(fits | (self._images == 0))

    def choose(self, job: Job, count: int) -> list[ReplicaKey]:
        """The `count` best replicas for `job`, best first: with room, then soonest.

        The best are worth knowing beside the best one: it may be gone by now.
        """
        finish_s, harm_s = self._finish_and_harm_s(job)
        # Routers that know the same must not all find the same replica best.
        jitter = JITTER * (1 - self._own_jobs / max(self._jobs, 1))
        score = (finish_s + CONCERN * harm_s) * (1 + jitter * self._chance.random(len(finish_s)))
        score[~self.has_room(job)] += FULL_S
        best = (
            np.argpartition(score, count)[:count] if count < len(score) else np.arange(len(score))
        )
        return [self._keys[place] for place in best[np.argsort(score[best])]]

    def _resize(self, count: int) -> None:
        self._jobs = sum(len(account.jobs) for account in self._accounts.values())
        self._own_jobs = sum(len(account.own) for account in self._accounts.values())
        self._ahead_s = np.zeros((count, len(STEPS_AT)))
        self._steps_beside = np.zeros((count, len(STEPS_AT)))
        self._written_s = np.zeros(count)
        self._images = np.zeros(count)
        self._news_s = np.array([account.news_s for account in self._accounts.values()], float)
        self._limits = np.full(count, np.inf)
        self._longest_steps: FIFOCache[str, Floats] = FIFOCache(MOST_COLUMNS)
        self._cost_columns: FIFOCache[str, Floats] = FIFOCache(MOST_COLUMNS)

    def _costs(self, size: str) -> Floats:
        """`fixed_s` and `row_s` of a size, on each replica."""
        column = self._cost_columns.get(size)
        if column is None:
            costs = [_cost(account.report, size) for account in self._accounts.values()]
            column = np.array([[cost.fixed_s, cost.row_s] for cost in costs]).reshape(-1, 2).T
            self._cost_columns[size] = column
        return column

    def _longest(self, group: str) -> Floats:
        """Steps that the longest request of a group has left, on each replica."""
        column = self._longest_steps.get(group)
        if column is None and group == ALONE:
            column = np.zeros(len(self._places))
        if column is None:
            jobs = [account.jobs.values() for account in self._accounts.values()]
            column = np.array([_longest(group, of_one) for of_one in jobs], float)
            self._longest_steps[group] = column
        return column

    def _settle(self, key: ReplicaKey) -> None:
        """Take off what melted since the row was written."""
        place, now_s = self._places[key], self._clock()
        total_s = self._ahead_s[place, -1]
        if total_s > 0:
            left = max(1 - (now_s - self._written_s[place]) / total_s, 0.0)
            self._ahead_s[place] *= left
            self._steps_beside[place] *= left
        self._written_s[place] = now_s

    def _write(self, key: ReplicaKey) -> None:
        """Work the row of a replica out anew from all that is known of it."""
        place, account = self._places[key], self._accounts[key]
        self._ahead_s[place] = 0.0
        self._steps_beside[place] = 0.0
        self._written_s[place] = self._clock()
        self._images[place] = 0
        self._limits[place] = account.report.image_limit
        parts = (part for job in account.jobs.values() for part in job.parts)
        for group in {part.group for part in parts} | set(self._longest_steps):
            self._longest(group)[place] = 0
        for size, costs in self._cost_columns.items():
            cost = _cost(account.report, size)
            costs[:, place] = cost.fixed_s, cost.row_s
        for job in account.jobs.values():
            self._add(place, job)

    def _add(self, place: int, job: Job) -> None:
        for part in job.parts:
            self._add_steps(place, job.rows, part)
        self._images[place] += job.images

    def _add_steps(self, place: int, rows: int, part: LaterSteps) -> None:
        fixed_s, row_s = self._costs(part.size)[:, place]
        longest = self._longest(part.group)
        if part.steps > longest[place]:
            beyond = np.minimum(STEPS_AT, part.steps) - np.minimum(STEPS_AT, longest[place])
            self._ahead_s[place] += fixed_s * beyond
            if part.group != ALONE:
                longest[place] = part.steps
        steps = np.minimum(STEPS_AT, part.steps)
        self._ahead_s[place] += row_s * rows * steps
        self._steps_beside[place] += steps


def _between(steps: int) -> tuple[int, int, float]:
    """The places in `STEPS_AT` on both sides of a number of steps, and how far it is between."""
    steps = min(steps, int(STEPS_AT[-1]))
    upper = int(np.searchsorted(STEPS_AT, steps))
    lower = max(upper - 1, 0)
    return lower, upper, float((steps - STEPS_AT[lower]) / (STEPS_AT[upper] - STEPS_AT[lower]))


def _cost(report: Report, size: str) -> StepCost:
    """What was measured there for this size, else the dearest of what was measured."""
    costs = report.costs or {}
    return costs.get(size) or max(costs.values(), key=lambda c: c.row_s, default=UNKNOWN_COST)


def _longest(group: str, jobs: Iterable[Job]) -> int:
    parts = (part for job in jobs for part in job.parts)
    return max((part.steps for part in parts if part.group == group), default=0)
