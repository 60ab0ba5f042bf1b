"""All routing policies on one trace."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.routing.routers import (
    FinishTimeRouter,
    LeastRequestsRouter,
    PowerOfTwoRouter,
    RandomRouter,
    RoundRobinRouter,
)
from loadtests.routing.simulator import Router, Served, mixed_trace, simulate

REPORT_PERIOD_S = 1.0
POLICY = "expected finish"
BASELINES = ("random", "round robin", "power of two", "least requests")
# Requests of the mixed trace that one replica can just serve in a second, with the best of the
# baselines in front of it: at more, queues grow without end. `capacity` measures it.
CAPACITY = 4.3
FLOOD = 12.0
# Of a simulation: the fleet is empty at first, and who comes then has it easy.
WARM_UP_SHARE = 1 / 3

MakeRouter = Callable[[int, int, Callable[[], float]], Router]
ROUTERS: dict[str, MakeRouter] = {
    "random": lambda replicas, seed, clock: RandomRouter(replicas, seed),
    "round robin": lambda replicas, seed, clock: RoundRobinRouter(replicas, seed),
    "power of two": lambda replicas, seed, clock: PowerOfTwoRouter(replicas, seed),
    "least requests": lambda replicas, seed, clock: LeastRequestsRouter(replicas, seed),
    POLICY: FinishTimeRouter,
}


@dataclass
class SimulatedClock:
    """Seconds of the simulation."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """How late it is."""
        return self.now_s

    def set(self, now_s: float) -> None:
        """It is so late now."""
        self.now_s = now_s


@dataclass(frozen=True)
class Latencies:
    """What the requests of a simulation took once it was warm, and when the last one was served."""

    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    end_s: float


def compare(
    replicas: int,
    routers: int,
    load: float,
    seconds: float,
    seed: int,
    speeds: Sequence[float] | None = None,
    policies: Sequence[str] = (*BASELINES, POLICY),
) -> dict[str, Latencies]:
    """Latencies of each policy on the same arrivals, at `load` times the capacity of the fleet."""
    speeds = speeds or [1.0] * replicas
    arrivals = mixed_trace(load * CAPACITY * sum(speeds), seconds, seed)
    results = {}
    for name in policies:
        clock = SimulatedClock()
        makers = [ROUTERS[name](replicas, seed + number, clock) for number in range(routers)]
        served = simulate(arrivals, makers, speeds, REPORT_PERIOD_S, clock.set)
        warm = [one for one in served if one.arrived_s >= WARM_UP_SHARE * seconds]
        results[name] = latencies(warm, clock.now_s)
    return results


def capacity(name: str, replicas: int = 8, seconds: float = 60, seed: int = 0) -> float:
    """Requests a second and replica that a policy serves when far more come."""
    arrivals = mixed_trace(FLOOD * replicas, seconds, seed)
    clock = SimulatedClock()
    router = ROUTERS[name](replicas, seed, clock)
    served = simulate(arrivals, [router], [1.0] * replicas, REPORT_PERIOD_S, clock.set)
    return len(served) / clock.now_s / replicas


def latencies(served: Sequence[Served], end_s: float) -> Latencies:
    """Their mean and percentiles."""
    seconds = sorted(one.latency_s for one in served)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return Latencies(statistics.mean(seconds), cuts[49], cuts[94], cuts[98], end_s)
