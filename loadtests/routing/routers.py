"""The policies that are compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import cast

from stepserve.routing.ledger import Ledger
from stepserve.routing.reports import Job, Report


class CountingRouter:
    """What ordinary routers know: how many of their own requests each replica has in flight."""

    def __init__(self, replicas: int, seed: int) -> None:
        self.requests = [0] * replicas
        self.chance = random.Random(seed)

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        raise NotImplementedError

    def sent(self, replica: int, job: Job) -> None:
        """One more."""
        self.requests[replica] += 1

    def ended(self, replica: int, job: Job) -> None:
        """One less."""
        self.requests[replica] -= 1

    def reported(self, replica: int, report: Report) -> None:
        """How many requests all routers together have there."""
        self.requests[replica] = len(report.jobs)


class RandomRouter(CountingRouter):
    """Any replica."""

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        return self.chance.randrange(len(self.requests))


class RoundRobinRouter(CountingRouter):
    """One after another, from a random one on."""

    def __init__(self, replicas: int, seed: int) -> None:
        super().__init__(replicas, seed)
        self.next = self.chance.randrange(replicas)

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        self.next = (self.next + 1) % len(self.requests)
        return self.next


class PowerOfTwoRouter(CountingRouter):
    """The one of two random replicas that has fewer requests: Ray Serve's default."""

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        count = len(self.requests)
        pair = self.chance.sample(range(count), min(2, count))
        return min(pair, key=lambda replica: self.requests[replica])


class LeastRequestsRouter(CountingRouter):
    """The replica with the fewest requests; any of those where several are."""

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        fewest = min(self.requests)
        return self.chance.choice([i for i, n in enumerate(self.requests) if n == fewest])


class FinishTimeRouter:
    """The batching request router's policy: the replica that would finish the request first."""

    def __init__(
        self, replicas: int, seed: int, clock: Callable[[], float], report_delay_s: float = 0.1
    ) -> None:
        self.ledger = Ledger(clock, report_delay_s, seed)
        self.ledger.set_replicas(range(replicas))

    def choose(self, job: Job) -> int:
        """The number of the replica that gets `job`."""
        return cast(int, self.ledger.choose(job, 1)[0])

    def sent(self, replica: int, job: Job) -> None:
        """It is in flight there from now on."""
        self.ledger.note_sent(replica, job)

    def ended(self, replica: int, job: Job) -> None:
        """It is not any more."""
        self.ledger.note_ended(replica, job.id)

    def reported(self, replica: int, report: Report) -> None:
        """What the replica has in flight now."""
        self.ledger.note_report(replica, report)
