from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
from engine_fakes import tensor_call
from hypothesis import given
from hypothesis import strategies as st
from stepserve.domain.requests import Priority
from stepserve.engine.calls.call import Call, ParkableMethod
from stepserve.engine.scheduling.demand import Demand, due_s, patience
from stepserve.engine.scheduling.policy import (
    HOLD,
    KINDS_IN_FLIGHT,
    SHORTEST_FIRST,
    Parked,
    Policy,
    method_limit,
    next_to_start,
    shortest_first,
)

from loadtests.policies import DUE_TIME, POLICIES, STRICT_FIFO, by_urgency, pick, strict_fifo

CHEAP_S, STEP_S = 0.002, 0.050
RULES = {
    name: ParkableMethod(name, "forward", lambda: None, stage, max_rows=max_rows)
    for name, stage, max_rows in (
        ("encoder", "encode", 32),
        ("small", "denoise", 8),
        ("large", "denoise", 8),
        ("decoder", "decode", 4),
    )
}
Pick = Callable[..., list[Parked]]
PRICES = {"encoder": CHEAP_S, "small": STEP_S, "large": 6 * STEP_S, "decoder": 0.02}


def price(call: Call, rows: int) -> float:
    return PRICES[call.method.module]


def parked(
    name: str,
    parked_s: float,
    sequence: int,
    rows: int = 1,
    width: int = 3,
    left_s: float = 0.0,
    serial_s: float = 0.0,
    priority: int = Priority.NORMAL,
) -> Parked:
    call = tensor_call(torch.zeros(rows, width), rule=RULES[name], sequence=sequence)
    return Parked(call, parked_s, Demand(priority=priority, left_s=left_s, serial_s=serial_s))


@st.composite
def waiting(draw: st.DrawFn) -> list[Parked]:
    """Calls of several kinds and sizes; a later sequence was never parked earlier."""
    count = draw(st.integers(0, 20))
    times = sorted(draw(st.lists(st.floats(0, 10), min_size=count, max_size=count)))
    items = [
        parked(
            draw(st.sampled_from(sorted(RULES))),
            parked_s,
            sequence,
            rows=draw(st.integers(1, 12)),
            width=draw(st.integers(1, 2)),
            left_s=draw(st.floats(0, 10)),
            serial_s=draw(st.floats(0, 20)),
        )
        for sequence, parked_s in enumerate(times)
    ]
    return draw(st.permutations(items))


PICKS = (pick, shortest_first, strict_fifo)


@pytest.mark.parametrize("choose", PICKS)
@given(items=waiting())
def test_never_empty_when_something_is_parked(choose: Pick, items: list[Parked]) -> None:
    assert bool(choose(items, price)) is bool(items)


@pytest.mark.parametrize("choose", PICKS)
@given(items=waiting())
def test_only_equal_keys_together_each_once(choose: Pick, items: list[Parked]) -> None:
    group = choose(items, price)
    assert len({item.call.key for item in group}) <= 1
    assert len({item.call.sequence for item in group}) == len(group)
    assert all(item in items for item in group)


@given(waiting())
def test_only_equal_keys_together_within_the_row_limit_oldest_first(items: list[Parked]) -> None:
    group = pick(items, price)
    if not group:
        return
    key, limit = group[0].call.key, group[0].call.method.max_rows
    same_key = sorted((i for i in items if i.call.key == key), key=lambda i: i.call.sequence)
    rows = sum(item.call.rows for item in group)
    assert group == same_key[: len(group)]
    assert rows <= limit or len(group) == 1
    if len(group) < len(same_key):
        assert rows + same_key[len(group)].call.rows > limit


@pytest.mark.parametrize("choose", PICKS)
@given(items=waiting(), limit=st.integers(1, 6))
def test_a_lowered_limit_is_kept(choose: Pick, items: list[Parked], limit: int) -> None:
    group = choose(items, price, lambda call: limit)
    assert len(group) <= 1 or sum(item.call.rows for item in group) <= limit


@given(waiting())
def test_nobody_else_is_due_sooner(items: list[Parked]) -> None:
    group = pick(items, price)
    for key in {item.call.key for item in items}:
        others = [item for item in items if item.call.key == key]
        first_s = by_urgency(group, price, method_limit)[0]
        assert first_s <= by_urgency(others, price, method_limit)[0]


def test_a_newcomers_encoder_goes_before_the_step_that_all_wait_for() -> None:
    """Even if the others have waited a little: so the newcomer takes part in that very step."""
    steps = [parked("small", 0.0, sequence) for sequence in range(4)]
    newcomer = parked("encoder", 0.010, sequence=9)
    assert pick([*steps, newcomer], price) == [newcomer]


def test_a_step_that_waited_for_its_own_cost_is_overtaken_no_more() -> None:
    step = parked("small", 0.0, sequence=0)
    newcomer = parked("encoder", STEP_S, sequence=1)
    assert pick([newcomer, step], price) == [step]


def test_of_equals_the_oldest_goes_first() -> None:
    calls = [parked("small", 1.0, sequence=5, width=1), parked("small", 1.0, sequence=4, width=2)]
    assert pick(calls, price) == [calls[1]]


def test_shapes_share_the_device_by_time() -> None:
    """A step that costs six times as much runs once for every six of the cheap one."""
    now_s, runs = 0.0, {"small.forward": 0, "large.forward": 0}
    waiting = {name: parked(name, 0.0, sequence) for sequence, name in enumerate(PRICES)}
    waiting = {name: waiting[name] for name in ("small", "large")}
    for sequence in range(700):
        (item,) = pick(list(waiting.values()), price)
        name = item.call.method.module
        now_s += PRICES[name]
        runs[item.call.key.method] += 1
        waiting[name] = parked(name, now_s, 10 + sequence)
    assert 5.5 < runs["small.forward"] / runs["large.forward"] < 6.5


@dataclass
class Adversary:
    """Tracks that re-park whatever hurts `victim` most, as soon as their forward is done.

    Forwards cost a fixed share and a share per row, so that company makes them longer.
    """

    prices: dict[str, float]
    now_s: float = 0.0
    sequence: int = 0

    def cost_of(self, call: Call, rows: int) -> float:
        return self.prices[call.method.module] * (0.5 + 0.5 * rows)

    def park(self, name: str, rows: int, priority: int, slack_s: float, left_s: float) -> Parked:
        self.sequence += 1
        rule = ParkableMethod(name, "forward", lambda: None, max_rows=4)
        call = tensor_call(torch.zeros(rows, 1), rule=rule, sequence=self.sequence)
        latest_s = self.now_s + slack_s
        demand = Demand(
            priority=priority, left_s=left_s, serial_s=2 * left_s, latest_start_s=latest_s
        )
        return Parked(call, self.now_s, demand)


NAMES = ("a", "b", "c", "d")
moves = st.tuples(
    st.sampled_from(NAMES),
    st.integers(1, 4),
    st.sampled_from(list(Priority)),
    st.sampled_from([-1.0, 0.0, 0.1, math.inf]),
    st.sampled_from([0.0, 0.01, 1.0, 1000.0]),
)
Move = tuple[str, int, int, float, float]


@pytest.mark.parametrize(("policy", "hold"), [(DUE_TIME, 1.0), (SHORTEST_FIRST, HOLD)])
@given(
    prices=st.lists(st.floats(0.001, 1.0), min_size=4, max_size=4),
    victim=moves,
    choices=st.lists(moves, min_size=30, max_size=30),
    others=st.integers(0, 10),
)
def test_no_call_waits_longer_than_the_bound(
    policy: Policy,
    hold: float,
    prices: list[float],
    victim: Move,
    choices: list[Move],
    others: int,
) -> None:
    """Start by t + H p C + A F, and within A ticks after t + H p C, as the docstring derives."""
    adversary = Adversary(dict(zip(NAMES, prices, strict=True)))
    choice = cycle(choices)
    tracks = [adversary.park(*next(choice)) for _ in range(others)]
    waiting = adversary.park(*victim)
    # Four rows are the limit of a forward.
    due_by_s = hold * patience(victim[2]) * 2.5 * adversary.prices[victim[0]]
    bound_s = due_by_s + (others + 1) * 2.5 * max(prices)
    late_ticks = 0
    while waiting not in (
        group := policy.pick([*tracks, waiting], adversary.cost_of, method_limit)
    ):
        late_ticks += adversary.now_s > due_by_s
        rows = sum(item.call.rows for item in group)
        adversary.now_s += adversary.cost_of(group[0].call, rows)
        tracks = [item for item in tracks if item not in group]
        tracks += [adversary.park(*next(choice)) for _ in group]
        assert adversary.now_s <= bound_s + 1e-9
        assert late_ticks <= others


def test_a_group_is_due_with_its_most_urgent_call() -> None:
    urgent = parked("large", 0.5, 3, priority=Priority.INTERACTIVE)
    batch = parked("large", 0.0, 0, priority=Priority.BATCH)
    step = parked("small", 0.52, 1)
    assert pick([batch, step], price) == [step]
    assert pick([batch, step, urgent], price) == [urgent, batch]


def test_when_rows_do_not_fit_the_urgent_go_first_and_equals_by_age() -> None:
    calls = [
        parked("small", 0.0, n, rows=2, priority=priority)
        for n, priority in enumerate([1, 2, 0, 1, 0, 2])
    ]
    assert [calls.index(item) for item in pick(calls, price)] == [2, 4, 0, 3]


def test_what_waits_at_low_priority_ages() -> None:
    batch = parked("large", 0.0, 0, rows=8, priority=Priority.BATCH)
    due_s = 8 * PRICES["large"]
    for now_s, expected in ((due_s - 0.1, False), (due_s, True)):
        newcomer = Parked(
            parked("large", now_s, 1, rows=8).call, now_s, Demand(priority=Priority.INTERACTIVE)
        )
        assert (pick([batch, newcomer], price) == [batch]) is expected


def test_a_deadline_that_presses_goes_first() -> None:
    calm = parked("small", 0.0, 0)
    for latest_start_s, first in ((math.inf, False), (0.2, False), (0.02, True), (-5.0, True)):
        pressed = Parked(parked("large", 0.01, 1).call, 0.01, Demand(latest_start_s=latest_start_s))
        assert (pick([calm, pressed], price) == [pressed]) is first


def test_nothing_is_due_before_it_was_parked() -> None:
    assert due_s(5.0, 1.0, Priority.INTERACTIVE, latest_start_s=-100) == 5.0


@pytest.mark.parametrize(("priority", "expected"), [(-3, 0.125), (0, 0.125), (2, 8), (9, 8)])
def test_unknown_priorities_are_the_nearest_known(priority: int, expected: float) -> None:
    assert patience(priority) == expected


def test_priorities_share_the_device_as_eight_to_one() -> None:
    """Two groups that cost the same; what they get is the share of their patience."""
    now_s, runs = 0.0, {"small": 0, "large": 0}
    priorities = {"small": Priority.NORMAL, "large": Priority.BATCH}
    waiting = {n: parked(n, 0.0, 0, priority=p) for n, p in priorities.items()}
    for sequence in range(900):
        (item,) = pick(list(waiting.values()), lambda call, rows: STEP_S)
        name = item.call.method.module
        now_s += STEP_S
        runs[name] += 1
        waiting[name] = Parked(
            parked(name, now_s, 1 + sequence).call, now_s, Demand(priority=priorities[name])
        )
    assert runs["small"] / runs["large"] == pytest.approx(8, rel=0.15)


def line_price(call: Call, rows: int) -> float:
    """A step costs little apart from its rows."""
    return PRICES[call.method.module] * (0.1 + 0.1 * rows)


def step(sequence: int, left_s: float, serial_s: float = 0.0, **more: Any) -> Parked:
    """A step of a request, parked at this moment."""
    name = more.pop("name", "small")
    return parked(name, 0.0, sequence, left_s=left_s, serial_s=serial_s or left_s, **more)


def pressed_by(item: Parked, latest_start_s: float) -> Parked:
    return replace(item, demand=item.demand._replace(latest_start_s=latest_start_s))


def test_of_two_shapes_the_one_with_the_shortest_request_goes_on() -> None:
    long, short = step(0, 2.0), step(1, 0.2, name="large")
    assert shortest_first([long, short], price) == [short]
    # What it asked for counts as well as what is left of it.
    nearly_done = step(2, 0.1, serial_s=8.0)
    assert shortest_first([nearly_done, short], price) == [short]
    assert shortest_first([long, nearly_done], price)[0] == nearly_done


def test_the_patient_weigh_less() -> None:
    urgent = step(0, 2.0, priority=Priority.INTERACTIVE)
    normal, batch = step(1, 1.0, width=1), step(2, 0.5, width=2, priority=Priority.BATCH)
    assert shortest_first([normal, batch, urgent], price) == [urgent]
    assert shortest_first([normal, batch], price) == [normal]


def test_encoders_and_decoders_go_ahead_of_the_steps_that_all_wait_for() -> None:
    steps = [step(n, 0.2) for n in range(3)]
    for name in ("encoder", "decoder"):
        newcomer = parked(name, 0.0, 9, serial_s=50.0)
        assert shortest_first([*steps, newcomer], price) == [newcomer]


def test_when_rows_do_not_fit_the_shortest_take_part() -> None:
    items = [step(n, left_s, rows=3) for n, left_s in enumerate([3.0, 1.0, 2.0])]
    assert shortest_first(items, price) == [items[1], items[2]]


def test_a_short_request_goes_without_others_that_would_slow_it_down() -> None:
    short, long = step(0, 0.1), [step(n, 4.0, rows=2) for n in (1, 2)]
    assert shortest_first([short, *long], line_price) == [short]
    # Of equals none is worth making the others wait.
    equal = [step(n, 1.0, rows=2) for n in range(4)]
    assert shortest_first(equal, line_price) == equal
    # Where steps cost the same whoever takes part, company costs nothing.
    assert shortest_first([short, *long], price) == [short, *long]


def test_nobody_is_left_behind_where_sharing_is_most_of_the_gain() -> None:
    short, long = step(0, 0.1), step(1, 4.0)
    assert shortest_first([short, long], lambda call, rows: 1.0 + 0.2 * rows) == [short, long]


def test_what_was_passed_over_for_long_enough_is_passed_over_no_more() -> None:
    for now_s, expected in ((HOLD * STEP_S * 0.99, "newcomer"), (HOLD * STEP_S, "waiting")):
        waiting = step(0, 50.0, width=1)
        newcomer = replace(step(1, 0.1, width=2), parked_s=now_s)
        chosen = {"newcomer": [newcomer], "waiting": [waiting]}[expected]
        assert shortest_first([waiting, newcomer], price) == chosen


def test_a_deadline_that_presses_goes_before_the_shortest() -> None:
    short = step(0, 0.1, width=1)
    pressed = pressed_by(step(1, 9.0, width=2), -1.0)
    calm = pressed_by(step(1, 9.0, width=2), 1.0)
    assert shortest_first([short, pressed], price) == [pressed]
    assert shortest_first([short, calm], price) == [short]


def fifo_line(*names: str) -> list[Parked]:
    """Denoiser calls of requests in the order of their arrival; the youngest call first."""
    return [
        Parked(parked(name, 0.0, 9 - arrival).call, 0.0, Demand(arrival))
        for arrival, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("line", "together"),
    [
        ("small", 1),
        ("small small large small", 2),
        ("large small small", 1),
        (" ".join(["small"] * 12), 8),
    ],
)
def test_strict_fifo_runs_the_oldest_and_a_different_one_blocks(line: str, together: int) -> None:
    calls = fifo_line(*line.split())
    assert strict_fifo(list(reversed(calls)), price) == calls[:together]
    assert strict_fifo([], price) == []


def test_strict_fifo_lets_newcomers_reach_their_first_step() -> None:
    rule = ParkableMethod("encoder", "forward", lambda: None, stage="encode")
    encode = Parked(tensor_call(torch.zeros(1, 3), rule=rule, sequence=9), 0.0, Demand(9))
    assert strict_fifo([*fifo_line("small", "small"), encode], price) == [encode]


def demand(arrival: int, rows: int, submitted_s: float, **more: Any) -> Demand:
    """A request that takes a second."""
    return Demand(arrival, rows, submitted_s=submitted_s, left_s=1.0, **more)


def test_room_beside_running_requests() -> None:
    running = [
        Demand(rows=4, priority=Priority.INTERACTIVE),
        Demand(rows=8, priority=Priority.BATCH),
    ]
    for priority, urgent, everyone in ((0, True, False), (1, True, False), (2, False, False)):
        newcomer = demand(0, 4, 0.0, priority=priority)
        assert SHORTEST_FIRST.has_room(newcomer, running, 12) is urgent
        assert STRICT_FIFO.has_room(newcomer, running, 12) is everyone
    large = demand(0, 99, 0.0)
    assert SHORTEST_FIRST.has_room(large, [], 12)
    assert STRICT_FIFO.has_room(large, [], 12)
    assert not SHORTEST_FIRST.has_room(large, running, 12)


def test_the_urgent_pass_an_old_one_that_does_not_fit_but_leave_it_its_rows() -> None:
    running = [
        Demand(rows=2, priority=Priority.INTERACTIVE),
        Demand(rows=6, priority=Priority.NORMAL),
    ]
    old = demand(0, 4, 0.0, priority=Priority.NORMAL)
    urgent, peer = demand(1, 2, 99.0, priority=Priority.INTERACTIVE), demand(2, 1, 0.5)

    def first(*queued: Demand, max_rows: int = 8) -> Demand | None:
        return next_to_start(queued, running, max_rows, DUE_TIME)

    assert first(old, peer) is None
    assert first(old, peer, urgent) == urgent
    # Two running, two more, and four that are kept for the old one: one row less is too few.
    assert first(old, urgent, max_rows=7) is None
    assert first(old, urgent, max_rows=12) == old
    assert first(demand(3, 99, 0.0), urgent) is None
    assert next_to_start([old, urgent], running, 8, STRICT_FIFO) is None
    assert first() is None


def test_rows_of_other_kinds_keep_nobody_from_starting() -> None:
    running = [Demand(rows=8, kind="small")]
    old, other = demand(0, 2, 0.0, kind="small"), demand(1, 2, 9.0, kind="large")

    def first(*queued: Demand, policy: Policy = SHORTEST_FIRST) -> Demand | None:
        return next_to_start(queued, running, 8, policy)

    assert first(old) is None
    assert first(old, other) == other
    assert first(old, other, policy=STRICT_FIFO) is None
    # It waits for rows of its kind, so others of its kind do not pass it.
    assert first(old, demand(1, 0, 9.0, kind="small")) is None


def test_all_kinds_together_have_the_rows_of_some_forwards() -> None:
    running = [Demand(rows=8, kind=kind) for kind in range(KINDS_IN_FLIGHT)]
    old, later = demand(0, 2, 0.0, kind="a"), demand(1, 2, 9.0, kind="b")
    assert next_to_start([old, later], running, 8, SHORTEST_FIRST) is None
    assert next_to_start([old, later], running[1:], 8, SHORTEST_FIRST) == old
    # Two more rows, which are kept for the old one, whatever its kind.
    almost = [*running[1:], Demand(rows=6, kind=0)]
    large, urgent = old._replace(rows=4), later._replace(priority=Priority.INTERACTIVE)
    assert next_to_start([large, later], almost, 8, SHORTEST_FIRST) is None
    assert next_to_start([large, urgent], almost, 8, SHORTEST_FIRST) == urgent
    busy = [item._replace(priority=Priority.INTERACTIVE) for item in almost]
    assert next_to_start([large, urgent], busy, 8, SHORTEST_FIRST) is None


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.integers(1, 12), st.sampled_from(Priority)),
        max_size=40,
    ),
    st.sampled_from([SHORTEST_FIRST, DUE_TIME, STRICT_FIFO]),
    st.randoms(use_true_random=False),
)
def test_what_is_started_fits_and_all_are_started(
    wanted: list[tuple[str, int, Priority]], policy: Policy, chance: random.Random
) -> None:
    max_rows, running = 8, list[Demand]()
    queued = [
        Demand(number, rows, 0, kind, priority, float(number), 1.0)
        for number, (kind, rows, priority) in enumerate(wanted)
    ]
    while queued or running:
        while first := next_to_start(queued, running, max_rows, policy):
            others = list(policy.beside(first, running))
            of_kind = [item.rows for item in others if item.kind == first.kind]
            assert not of_kind or sum(of_kind) + first.rows <= max_rows
            in_all = sum(item.rows for item in others) + first.rows
            assert not others or in_all <= policy.kinds_in_flight * max_rows
            queued.remove(first)
            running.append(first)
        assert running, "nobody runs, and nobody is started"
        running.pop(chance.randrange(len(running)))


def test_policies_are_chosen_by_name() -> None:
    assert POLICIES["due-time"].pick is pick
    assert POLICIES["strict-fifo"].pick is strict_fifo
    assert POLICIES["strict-fifo"].rank(demand(7, 1, 0.0)) == 7
