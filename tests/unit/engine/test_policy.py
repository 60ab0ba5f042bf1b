from __future__ import annotations

from dataclasses import dataclass

import torch
from engine_fakes import tensor_call
from hypothesis import given
from hypothesis import strategies as st

from service.engine.call import CallKey, ParkableMethod
from service.engine.policy import Parked, group_due_s, pick

CHEAP_S, STEP_S = 0.002, 0.050
RULES = {
    name: ParkableMethod(name, "forward", lambda: None, max_rows=max_rows)
    for name, max_rows in (("encoder", 32), ("small", 8), ("large", 8), ("decoder", 4))
}
PRICES = {"encoder": CHEAP_S, "small": STEP_S, "large": 6 * STEP_S, "decoder": 0.02}


def price(key: CallKey, rows: int) -> float:
    return PRICES[key.method.split(".")[0]]


def parked(name: str, parked_s: float, sequence: int, rows: int = 1, width: int = 3) -> Parked:
    call = tensor_call(torch.zeros(rows, width), rule=RULES[name], sequence=sequence)
    return Parked(call, parked_s)


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
        )
        for sequence, parked_s in enumerate(times)
    ]
    return draw(st.permutations(items))


@given(waiting())
def test_never_empty_when_something_is_parked(items: list[Parked]) -> None:
    assert bool(pick(items, price)) is bool(items)


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


@given(waiting(), st.integers(1, 6))
def test_a_lowered_limit_is_kept(items: list[Parked], limit: int) -> None:
    group = pick(items, price, limit_of=lambda call: limit)
    assert len(group) <= 1 or sum(item.call.rows for item in group) <= limit


@given(waiting())
def test_nobody_else_is_due_sooner(items: list[Parked]) -> None:
    group = pick(items, price)
    for key in {item.call.key for item in items}:
        others = [item for item in items if item.call.key == key]
        limit = others[0].call.method.max_rows
        assert group_due_s(group, price, limit) <= group_due_s(others, price, limit)


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
    """Tracks that re-park whatever hurts `victim` most, as soon as their forward is done."""

    prices: dict[str, float]
    now_s: float = 0.0
    sequence: int = 0

    def cost_of(self, key: CallKey, rows: int) -> float:
        return self.prices[key.method.split(".")[0]]

    def park(self, cost_s: float) -> Parked:
        self.sequence += 1
        name = f"track{self.sequence}"
        self.prices[name] = cost_s
        rule = ParkableMethod(name, "forward", lambda: None)
        return Parked(tensor_call(torch.zeros(1, 1), rule=rule, sequence=self.sequence), self.now_s)


@given(
    victim_cost_s=st.floats(0.01, 1.0),
    costs=st.lists(st.floats(0.001, 1.0), min_size=40, max_size=40),
    others=st.integers(0, 10),
)
def test_no_call_waits_longer_than_the_bound(
    victim_cost_s: float, costs: list[float], others: int
) -> None:
    """Start by t + C + A * F, as the policy's docstring derives."""
    adversary = Adversary({})
    choice = iter(costs * 100)
    tracks = [adversary.park(next(choice)) for _ in range(others)]
    victim = adversary.park(victim_cost_s)
    longest_s = max([*costs, victim_cost_s])
    bound_s = victim_cost_s + (others + 1) * longest_s
    while True:
        (chosen,) = pick([*tracks, victim], adversary.cost_of)
        if chosen is victim:
            break
        adversary.now_s += adversary.cost_of(chosen.call.key, 1)
        tracks.remove(chosen)
        tracks.append(adversary.park(next(choice)))
        assert adversary.now_s <= bound_s + 1e-9
