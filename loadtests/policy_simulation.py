"""What a policy does to latency and goodput: the real policy, forwards that only take time.

    python -m loadtests.policy_simulation

Requests arrive at random (Poisson), want one of two image sizes and a number of steps, and step
together as one of `loadtests.policies` decides. A forward takes what was measured for the 20 M
UNet in bf16 on two cores; the larger size takes four times as long for the same rows. Everything is
drawn from a seed, so that two policies meet the very same requests.
"""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import optree
from stepserve.engine.calls.arguments import ArgumentKind
from stepserve.engine.calls.call import Call, ParkableMethod
from stepserve.engine.calls.call_key import CallKey, Layout
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.policy import (
    Parked,
    Policy,
    method_limit,
    next_to_start,
)

from loadtests.policies import POLICIES

Choice = TypeVar("Choice", bound=Hashable)

MEASURED_S = {0: 0.0147, 2: 0.017, 8: 0.040, 16: 0.054, 32: 0.104}
STEPS = {4: 0.25, 10: 0.25, 20: 0.35, 50: 0.15}
GUIDED = 0.8
COSTS = {"small": 1.0, "large": 4.0}
SLOWDOWN = 5.0
WITHIN = 0.9
MAX_ROWS = 32
DENOISER = ParkableMethod("unet", "forward", lambda: None, max_rows=MAX_ROWS)


@dataclass(frozen=True)
class Request:
    """One simulated request, which arrives at `arrival_s`."""

    arrival_s: float
    size: str
    rows: int
    steps: int

    @property
    def serial_s(self) -> float:
        """What it takes when it is alone."""
        return self.steps * forward_s(self.size, self.rows)


@dataclass(frozen=True)
class Mix:
    """What requests are like: shares of sizes, of step counts, and of guided ones."""

    sizes: dict[str, float]
    steps: dict[int, float]
    guided: float = GUIDED

    def draw(self, count: int, seed: int) -> list[Request]:
        """Requests that arrive once a second on average."""
        chance = random.Random(seed)
        now_s, requests = 0.0, []
        for _ in range(count):
            now_s += chance.expovariate(1.0)
            rows = 2 if chance.random() < self.guided else 1
            size, steps = _choose(chance, self.sizes), _choose(chance, self.steps)
            requests.append(Request(now_s, size, rows, steps))
        return requests


def at_rate(requests: Sequence[Request], per_s: float) -> list[Request]:
    """The same requests, arriving `per_s` times a second."""
    return [replace(request, arrival_s=request.arrival_s / per_s) for request in requests]


def forward_s(size: str, rows: int) -> float:
    """Seconds of one forward: a line between the measured row counts, and on beyond them."""
    known = sorted(MEASURED_S)
    place = min(max(bisect_right(known, rows), 1), len(known) - 1)
    low, high = known[place - 1], known[place]
    slope = (MEASURED_S[high] - MEASURED_S[low]) / (high - low)
    return COSTS[size] * (MEASURED_S[low] + slope * (rows - low))


class Simulation:
    """One device, one policy. `run` gives the latency of each request."""

    def __init__(self, policy: Policy, max_rows: int = MAX_ROWS) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.now_s = 0.0
        self.queued: list[tuple[int, Request]] = []
        self.parked: dict[int, Parked] = {}
        self.steps_left: dict[int, int] = {}
        self.latency_s: dict[int, float] = {}
        self._sequence = 0

    def run(
        self, requests: Sequence[Request], give_up: Callable[[int, float], bool] | None = None
    ) -> list[float]:
        """Latencies in the order of the requests; what was not finished before giving up is inf."""
        coming = deque(enumerate(requests))
        while coming or self.queued or self.parked:
            while coming and coming[0][1].arrival_s <= self.now_s:
                self.queued.append(coming.popleft())
            self._start_queued()
            if self.parked:
                ended = self._tick(requests)
                if give_up is not None and any(give_up(n, self.latency_s[n]) for n in ended):
                    break
            else:
                self.now_s = coming[0][1].arrival_s
        return [self.latency_s.get(number, math.inf) for number in range(len(requests))]

    def _start_queued(self) -> None:
        while self.queued:
            line = {
                _demand(number, request, request.steps): request for number, request in self.queued
            }
            running = [item.demand for item in self.parked.values()]
            first = next_to_start(list(line), running, self.max_rows, self.policy)
            if first is None:
                return
            request = line[first]
            self.queued.remove((first.arrival, request))
            self.steps_left[first.arrival] = request.steps
            self._park(first.arrival, request)

    def _tick(self, requests: Sequence[Request]) -> list[int]:
        group = self.policy.pick(list(self.parked.values()), _cost_of, method_limit)
        self.now_s += _cost_of(group[0].call, sum(item.call.rows for item in group))
        ended = []
        for number in (item.demand.arrival for item in group):
            self.steps_left[number] -= 1
            if self.steps_left[number]:
                self._park(number, requests[number])
            else:
                del self.parked[number], self.steps_left[number]
                self.latency_s[number] = self.now_s - requests[number].arrival_s
                ended.append(number)
        return ended

    def _park(self, number: int, request: Request) -> None:
        self._sequence += 1
        call = Call(DENOISER, (), {}, (), KEYS[request.size], request.rows, self._sequence)
        demand = _demand(number, request, self.steps_left[number])
        self.parked[number] = Parked(call, self.now_s, demand)


def one_at_a_time(requests: Sequence[Request]) -> list[float]:
    """Latencies where each request runs alone, in the order of arrival."""
    now_s, latencies = 0.0, []
    for request in requests:
        now_s = max(now_s, request.arrival_s) + request.serial_s
        latencies.append(now_s - request.arrival_s)
    return latencies


def holds(policy: Policy, requests: Sequence[Request]) -> bool:
    """Whether nine of ten requests are finished within five times what they take alone."""
    late = 0

    def too_many_late(number: int, latency_s: float) -> bool:
        nonlocal late
        late += latency_s > SLOWDOWN * requests[number].serial_s
        return late > (1 - WITHIN) * len(requests)

    Simulation(policy).run(requests, too_many_late)
    return late <= (1 - WITHIN) * len(requests)


def goodput_knee(policy: Policy, mix: Mix, count: int = 800, seed: int = 1) -> float:
    """The highest rate of arrivals, per second, at which `holds` is true; to 2 %."""
    requests = mix.draw(count, seed)
    low, high = 0.1, 0.2
    while holds(policy, at_rate(requests, high)):
        low, high = high, 2 * high
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(policy, at_rate(requests, middle)) else (low, middle)
    return low


@dataclass(frozen=True)
class Latencies:
    """Seconds, of requests with so many steps."""

    mean_s: float
    p99_s: float


def latencies(requests: Sequence[Request], seconds: Sequence[float], steps: int) -> Latencies:
    """Of those requests that have `steps` steps."""
    chosen = sorted(s for r, s in zip(requests, seconds, strict=True) if r.steps == steps)
    return Latencies(sum(chosen) / len(chosen), chosen[int(0.99 * len(chosen))])


def rate_alone(requests: Sequence[Request], load: float) -> float:
    """The rate at which requests would keep a server busy for that share, one at a time."""
    return load * len(requests) / sum(request.serial_s for request in requests)


def main() -> None:
    """Print the knees of all policies, and what short requests gain beside long ones."""
    two_sizes = Mix({"small": 0.7, "large": 0.3}, STEPS)
    report: dict[str, object] = {
        f"knee_per_s_{name}": round(goodput_knee(policy, two_sizes), 3)
        for name, policy in POLICIES.items()
    }
    drawn = Mix({"small": 1.0}, {4: 0.5, 50: 0.5}).draw(2000, seed=2)
    requests = at_rate(drawn, rate_alone(drawn, load=0.8))
    results = {name: Simulation(policy).run(requests) for name, policy in POLICIES.items()}
    results["one-at-a-time"] = one_at_a_time(requests)
    for steps in (4, 50):
        for name, seconds in results.items():
            of_steps = latencies(requests, seconds, steps)
            report[f"steps_{steps}_{name}"] = [round(of_steps.mean_s, 3), round(of_steps.p99_s, 3)]
    print(json.dumps(report, indent=2))


def _choose(chance: random.Random, shares: Mapping[Choice, float]) -> Choice:
    return chance.choices(list(shares), weights=list(shares.values()))[0]


def _demand(number: int, request: Request, steps: int) -> Demand:
    return Demand(
        number,
        request.rows,
        steps,
        KEYS[request.size],
        submitted_s=request.arrival_s,
        left_s=steps * forward_s(request.size, request.rows),
        serial_s=request.serial_s,
    )


def _key(size: str) -> CallKey:
    layout = Layout((), optree.tree_structure(cast(Any, ((0,), []))))
    return CallKey("unet.forward", layout, ((ArgumentKind.BATCHED, size),))


KEYS = {size: _key(size) for size in COSTS}
SIZES = {key: size for size, key in KEYS.items()}


def _cost_of(call: Call, rows: int) -> float:
    return forward_s(SIZES[call.key], rows)


if __name__ == "__main__":
    main()
