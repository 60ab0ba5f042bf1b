"""Who goes next where one forward may hold rows of several lengths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from engine_fakes import tensor_call
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.requests import Priority
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import Call, ParkableMethod, longest
from stepserve.engine.scheduling.demand import Demand, patience
from stepserve.engine.scheduling.policy import HOLD, Parked, shortest_first

LIMIT = 8
METHOD = ParkableMethod(
    "transformer",
    "forward",
    lambda: None,
    parameters=("x",),
    rules=ArgumentRules(row_lists=frozenset({"x"}), row_tokens={"x": len}),
    max_rows=LIMIT,
)


def step(sequence: int, length: int, rows: int = 1, left_s: float = 1.0) -> Parked:
    """A step of a request that has just begun."""
    call = tensor_call([torch.zeros(length, 1)] * rows, rule=METHOD, sequence=sequence)
    return Parked(call, 0.0, Demand(left_s=left_s, serial_s=left_s))


def mostly_fixed(call: Call, rows: int) -> float:
    return 0.100 + 0.001 * call.length * rows


def mostly_rows(call: Call, rows: int) -> float:
    return 0.001 + 0.001 * call.length * rows


def test_lengths_share_a_forward_where_that_costs_less() -> None:
    items = [step(0, 10), step(1, 20, rows=2), step(2, 12)]
    assert shortest_first(items, mostly_fixed) == items
    assert shortest_first(items, mostly_rows) == [items[0]]


def test_the_one_with_the_least_to_do_leads_whatever_its_length() -> None:
    small, large = step(0, 10, left_s=5.0), step(1, 200, left_s=1.0)
    assert shortest_first([small, large], mostly_rows) == [large]
    # One of ten tokens less costs as much less, and saves a forward.
    near = step(2, 190, left_s=1.2)
    fixed_s = 0.020
    items = [small, large, near]
    assert shortest_first(items, lambda call, rows: fixed_s + mostly_rows(call, rows)) == [
        large,
        near,
    ]


def test_a_short_request_goes_without_long_rows_that_would_slow_it_down() -> None:
    """It would gain a forward in all, but its own step would take four times as long."""

    def price(call: Call, rows: int) -> float:
        return 0.0012 + 0.0001 * call.length * rows

    short, long = step(0, 10, left_s=0.1), step(1, 11, rows=7, left_s=4.0)
    assert shortest_first([short, long], price) == [short]
    assert shortest_first([step(0, 10, left_s=4.0), long], price)[-1] == long


def test_more_rows_than_fit_are_not_mixed_and_go_in_order() -> None:
    items = [step(n, 10, rows=3, left_s=1.0 + n) for n in range(3)] + [step(9, 11, left_s=0.5)]
    # The nine rows of the other length would not go whole.
    assert shortest_first(items, mostly_fixed) == [items[3]]
    assert shortest_first(items[:3], mostly_fixed) == items[:2]


@st.composite
def waiting(draw: st.DrawFn) -> list[Parked]:
    count = draw(st.integers(1, 12))
    rest = st.tuples(st.integers(1, 6), st.integers(1, 5), st.floats(0, 10))
    return [step(number, *draw(rest)) for number in range(count)]


@dataclass(frozen=True)
class Learned:
    """A line for each length, as unlike the next as measurements may be."""

    lines: tuple[tuple[float, float], ...]

    def __call__(self, call: Call, rows: int) -> float:
        fixed_s, row_s = self.lines[call.length % len(self.lines)]
        return fixed_s + row_s * rows


line = st.tuples(st.floats(1e-4, 1.0), st.floats(0.0, 0.5))
learned = st.lists(line, min_size=7, max_size=7).map(lambda lines: Learned(tuple(lines)))


@given(waiting(), learned)
def test_no_forward_is_mixed_that_costs_more_than_its_parts(
    items: list[Parked], cost_of: Learned
) -> None:
    group = shortest_first(items, cost_of)
    assert group
    assert all(item in items for item in group)
    rows = sum(item.call.rows for item in group)
    assert rows <= LIMIT or len(group) == 1
    parts = defaultdict[int, list[Call]](list)
    for item in group:
        parts[item.call.length].append(item.call)
    if len(parts) > 1:
        together_s = cost_of(longest([item.call for item in group]), rows)
        assert together_s <= sum(_cost_s(calls, cost_of) for calls in parts.values())


def _cost_s(calls: Sequence[Call], cost_of: Learned) -> float:
    return cost_of(calls[0], sum(call.rows for call in calls))


@dataclass
class Adversary:
    """Tracks that re-park whatever hurts a victim most, as soon as their forward is done."""

    cost_of: Learned
    now_s: float = 0.0
    sequence: int = 0

    def park(self, length: int, rows: int, priority: int, slack_s: float, left_s: float) -> Parked:
        self.sequence += 1
        call = step(self.sequence, length, rows).call
        latest_s = self.now_s + slack_s
        demand = Demand(
            priority=priority, left_s=left_s, serial_s=2 * left_s, latest_start_s=latest_s
        )
        return Parked(call, self.now_s, demand)


moves = st.tuples(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from(list(Priority)),
    st.sampled_from([-1.0, 0.0, 0.1, math.inf]),
    st.sampled_from([0.0, 0.01, 1.0, 1000.0]),
)
Move = tuple[int, int, int, float, float]


@given(
    cost_of=learned,
    victim=moves,
    choices=st.lists(moves, min_size=30, max_size=30),
    others=st.integers(0, 10),
)
def test_no_call_waits_longer_than_the_bound_where_lengths_are_mixed(
    cost_of: Learned, victim: Move, choices: list[Move], others: int
) -> None:
    """Start by t + H p C + A F, and within A ticks after t + H p C; C is of its own length."""
    adversary = Adversary(cost_of)
    choice = cycle(choices)
    tracks = [adversary.park(*next(choice)) for _ in range(others)]
    victim_item = adversary.park(*victim)
    due_by_s = HOLD * patience(victim[2]) * cost_of(victim_item.call, LIMIT)
    longest_s = max(fixed_s + row_s * LIMIT for fixed_s, row_s in cost_of.lines)
    late_ticks = 0
    while victim_item not in (group := shortest_first([*tracks, victim_item], cost_of)):
        late_ticks += adversary.now_s > due_by_s
        rows = sum(item.call.rows for item in group)
        adversary.now_s += cost_of(longest([item.call for item in group]), rows)
        tracks = [item for item in tracks if item not in group]
        tracks += [adversary.park(*next(choice)) for _ in group]
        assert adversary.now_s <= due_by_s + (others + 1) * longest_s + 1e-9
        assert late_ticks <= others
