"""Who goes next: which parked calls share the next forward, and which request is started next.

Pure: costs and limits are arguments. There are three policies, chosen by name from `POLICIES`.

SHORTEST_FIRST, the default. Users mind waiting in proportion to what they asked for, so a second of
waiting weighs 1 / (patience * seconds that the request takes alone), where the patience is that of
its priority: an eighth for interactive work, 1 for normal, 8 for batch. The least weighted waiting
in all comes from Smith's rule (W. E. Smith, 1956): what has the least time left for its weight goes
first. So

- among groups (calls with equal keys, which can share a forward) the one runs that holds the call
  with the least `seconds left * seconds alone * patience`; what is no denoising step counts as if
  its request were nothing else, so that a newcomer's text encoder goes ahead of the step that all
  wait for, and the newcomer joins that very step;
- in a group the rows are filled in that order. Company makes a step longer for those in front,
  and spares one for those behind: of the line's front and rest, the front goes by itself where
  what it gains is worth at least twice what the rest and all others lose (`front_of`);
- nothing starves. A call that waited for `HOLD * patience * seconds of its forward` is overdue, and
  so is one whose latest start for its request's deadline has come. Overdue calls go before others,
  first those overdue the longest.

DUE_TIME, which shares the device by time. What waits is due at

    since_s + patience * expected seconds

If a request has a deadline, and its latest start by which that can be met comes sooner, it
is due then, though never before `since_s`. What is due first goes first:

- Among calls, `since_s` is when the call was parked and the seconds are those of the forward that
  it can share. Calls with equal keys form a group, which is due with its most urgent call. The
  group that is due first runs, its most urgent calls first while their rows fit.
- A cheap call parked a little later goes ahead of an expensive one, and shapes share the device by
  time: a step that costs six times as much comes once for every six of the cheap one. Between
  priorities the shares of time are as 8 to 1.

Under both, a queued request is due in the same way, from when it was submitted and with the seconds
of all its steps. It is started while its rows fit beside those that running requests of at least
its priority will still take; the rows of lower ones it may take. They stay parked, and go on later
exactly where they stood. Rows count among requests of its kind, which it can share forwards with:
others neither fill nor lengthen these. So each kind gets large forwards on a mixed load; but all
together have at most `KINDS_AT_WORK` forwards' rows, as each at work gets a step now and then and
what is started need not wait for the rest. Behind one that does not fit yet, only requests of
higher priority (or of another kind, where it is the rows of its own that it waits for) are started,
and only while they leave it its rows: so neither do the old block the urgent, nor the urgent starve
them. A short request is started before long ones that were submitted a little earlier.

Nothing starves. Let call x be parked at t with patience p, let C be the largest expected cost of
a forward with its key, F the longest forward and A the number of tracks at work; let H be `HOLD`
for SHORTEST_FIRST and 1 for DUE_TIME. x's group is due by t + H * p * C, whoever else is in it.
Nobody is due before being parked, so a call parked after that is due later still, whatever its
priority and deadline, and no group is led by it while x waits. What leads a group before x is
therefore parked by t + H * p * C: besides the forward that runs at that moment these are at most
A - 1 calls, one for each other track, and each goes once. Hence x starts no later than

    t + H * p * C + A * F

however many urgent or cheap newcomers arrive. Counted in ticks: after t + H * p * C at most A.

STRICT_FIFO is what other servers do, and is kept to compare with: calls run for the oldest request
alone and for those right behind it that happen to want the same; the first request that wants
something else blocks all behind it. Priorities and deadlines are not heeded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import accumulate
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

from stepserve.domain.requests import Priority
from stepserve.engine.calls.call import Call, CallKey

CostOf = Callable[[CallKey, int], float]
LimitOf = Callable[[Call], int]

PATIENCE: dict[int, float] = {
    Priority.INTERACTIVE: 0.125,
    Priority.NORMAL: 1.0,
    Priority.BATCH: 8.0,
}
DENOISE = "denoise"
# Of any request: nothing is learned of it yet.
SHORTEST_S = 1e-3
# How many times the seconds of its forward a call is passed over for shorter requests, at most.
HOLD = 8.0
# A front goes by itself only if it gains so many times what the others lose: sharing is what keeps
# the device fast, and how long requests take is only an estimate.
WORTH = 2.0
# Only those go without others who asked for so many times less: else requests that are all alike
# would go in smaller and smaller company.
CLEARLY = 2.0
# A front costs no more than this share of the forward; and where it costs nothing, nothing is known
# of what sharing spares, as the cost model has seen one row count.
LEAST_LOST, MOST_LOST = 0.01, 0.2
# Rows at work in all, over those of one kind.
KINDS_AT_WORK = 3


@dataclass(frozen=True)
class Parked:
    """A call that waits for a forward since `parked_s` on the engine's clock.

    Args:
        priority: of its request.
        latest_start_s: when it must run for its request to meet its deadline.
        arrival: orders requests by their submission.
        left_s: what the steps left to its request would take alone.
        serial_s: what all its steps would take alone.
    """

    call: Call
    parked_s: float
    priority: int = Priority.NORMAL
    latest_start_s: float = math.inf
    arrival: int = 0
    left_s: float = 0.0
    serial_s: float = 0.0

    @property
    def is_step(self) -> bool:
        """Whether it is a denoising step, of which its request has more."""
        return self.call.method.stage == DENOISE

    @property
    def weight(self) -> float:
        """What a second of waiting counts for it."""
        return 1 / (patience(self.priority) * max(self.serial_s, SHORTEST_S))


class Queued(NamedTuple):
    """A request that was not started yet. `run_s` is what its steps should take.

    Requests of equal `kind` can share forwards.
    """

    arrival: int
    rows: int
    submitted_s: float
    run_s: float
    priority: int = Priority.NORMAL
    latest_start_s: float = math.inf
    kind: Hashable = None


@dataclass(frozen=True)
class Running:
    """A request that was started.

    Args:
        rows: the most that it will still take at a step.
        kind: requests of equal kind can share forwards.
    """

    rows: int
    priority: int = Priority.NORMAL
    kind: Hashable = None


class Lacking(Enum):
    """What a request waits for that cannot be started yet."""

    ROWS_OF_ITS_KIND = "rows of its kind"
    ROWS_IN_ALL = "rows in all"


def method_limit(call: Call) -> int:
    """The row limit that the method was given."""
    return call.method.max_rows


def due_s(since_s: float, seconds: float, priority: int, latest_start_s: float = math.inf) -> float:
    """When something is due on the engine's clock: the sooner, the older, cheaper and urgent."""
    return min(since_s + patience(priority) * seconds, max(latest_start_s, since_s))


def patience(priority: int) -> float:
    """How many times its expected seconds something waits before it goes ahead of newcomers."""
    return PATIENCE[min(max(priority, Priority.INTERACTIVE), Priority.BATCH)]


def pick(
    parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
) -> list[Parked]:
    """The calls for the next forward, most urgent first; empty if nothing is parked."""
    # A group is due with its most urgent call. `min` keeps the first of equals, which is the group
    # with the oldest call.
    lines = [by_urgency(g, cost_of, limit_of(g[0].call)) for g in _groups(parked)]
    _, line = min(lines, key=itemgetter(0), default=(0.0, []))
    return fit_rows(line, limit_of(line[0].call)) if line else []


def shortest_first(
    parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
) -> list[Parked]:
    """The calls for the next forward: overdue ones, else those with the least left to do."""
    if not parked:
        return []
    # The latest call was parked a moment ago. Where it was not, no call was parked since.
    now_s = max(item.parked_s for item in parked)
    overdue: list[tuple[float, list[Parked]]] = []
    ranked: list[tuple[float, list[Parked]]] = []
    for group in _groups(parked):
        seconds = _forward_s(group, cost_of, limit_of(group[0].call))
        ranks = sorted(((_rank(item, seconds), item) for item in group), key=itemgetter(0))
        line = [item for _, item in ranks]
        ranked.append((ranks[0][0], line))
        due = {item.call.sequence: _overdue_s(item, seconds) for item in group}
        late = [item for item in group if due[item.call.sequence] <= now_s]
        if late:
            late.sort(key=lambda item: due[item.call.sequence])
            in_time = [item for item in line if due[item.call.sequence] > now_s]
            overdue.append((due[late[0].call.sequence], late + in_time))
    _, line = min(overdue or ranked, key=itemgetter(0))
    fitting = fit_rows(line, limit_of(line[0].call))
    if overdue or not line[0].is_step:
        return fitting
    count = front_of(
        [item.call.rows for item in fitting],
        [item.weight for item in fitting],
        sum(item.weight for item in parked),
        partial(cost_of, line[0].call.key),
    )
    return fitting[:count]


def front_of(
    rows: Sequence[int],
    weights: Sequence[float],
    all_weights: float,
    cost_s: Callable[[int], float],
) -> int:
    """How many of a line had better go without the rest; all of them where none should.

    A front of cost f leaves a rest of cost r, where both together cost c: each in front ends its
    step by c - f sooner, and everybody else, in the line or not, goes on by f + r - c later.

    Args:
        rows: of those in the line, who may share a forward; the least left to do comes first.
        weights: of the same.
        all_weights: the sum over all that wait, in the line or not.
        cost_s: seconds of a forward by its rows.
    """
    all_rows = sum(rows)
    together_s = cost_s(all_rows)
    best, chosen = 0.0, len(rows)
    front_rows, front_weight = 0, 0.0
    heaviest_behind = list(accumulate(reversed(weights), max))[::-1]
    for count in range(1, len(rows)):
        front_rows += rows[count - 1]
        front_weight += weights[count - 1]
        if weights[count - 1] < CLEARLY * heaviest_behind[count]:
            continue
        front_s = cost_s(front_rows)
        lost_s = front_s + cost_s(all_rows - front_rows) - together_s
        if not LEAST_LOST <= lost_s / together_s <= MOST_LOST:
            continue
        gain = front_weight * (together_s - front_s) - WORTH * (all_weights - front_weight) * lost_s
        if gain > best:
            best, chosen = gain, count
    return chosen


def by_urgency(group: Sequence[Parked], cost_of: CostOf, limit: int) -> tuple[float, list[Parked]]:
    """When calls with equal keys are due, and they themselves, the most urgent first.

    Args:
        group: oldest first, which is kept among those that are equally urgent.
    """
    seconds = _forward_s(group, cost_of, limit)
    line = sorted(((_call_due_s(p, seconds), p) for p in group), key=itemgetter(0))
    return line[0][0], [item for _, item in line]


def fit_rows(group: Sequence[Parked], limit: int) -> list[Parked]:
    """The first calls whose rows fit into one forward; at least one, however large."""
    chosen: list[Parked] = []
    rows = 0
    for item in group:
        if chosen and rows + item.call.rows > limit:
            break
        chosen.append(item)
        rows += item.call.rows
    return chosen


def strict_fifo(
    parked: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf = method_limit
) -> list[Parked]:
    """The oldest request's call, with those right behind that have the same key.

    Calls that are no denoising step go first, one by one: they belong to the start and the end of
    a request, and would else keep newcomers from ever joining.
    """
    others = [item for item in parked if item.call.method.stage != DENOISE]
    if others:
        return [min(others, key=_sequence)]
    line = sorted(parked, key=lambda item: item.arrival)
    same = next((i for i, p in enumerate(line) if p.call.key != line[0].call.key), len(line))
    return fit_rows(line[:same], limit_of(line[0].call)) if line else []


def request_due_s(queued: Queued) -> float:
    """When a queued request is due to be started."""
    return due_s(queued.submitted_s, queued.run_s, queued.priority, queued.latest_start_s)


def next_to_start(
    queued: Sequence[Queued], running: Sequence[Running], max_rows: int, policy: Policy
) -> Queued | None:
    """The queued request to be started now, if there is room for any.

    Args:
        max_rows: of a forward.
    """
    line = list(queued)
    of_kind: dict[Hashable, int] = defaultdict(lambda: max_rows)
    in_all = policy.rows_at_work(max_rows)
    while line:
        head = min(line, key=policy.rank)
        lacking = policy.lacking(head, running, of_kind[head.kind], in_all)
        if lacking is None:
            return head
        # What is kept for it.
        of_kind[head.kind] = max(of_kind[head.kind] - head.rows, 0)
        line = [item for item in line if _may_pass(item, head, lacking)]
        if lacking is Lacking.ROWS_IN_ALL:
            in_all = max(in_all - head.rows, 0)
    return None


def as_urgent(queued: Queued | Running, running: Sequence[Running]) -> Sequence[Running]:
    """Running requests that are at least as urgent."""
    return [item for item in running if item.priority <= queued.priority]


def all_running(queued: Queued | Running, running: Sequence[Running]) -> Sequence[Running]:
    """All running requests."""
    return running


@dataclass(frozen=True)
class Policy:
    """One way to decide.

    Args:
        pick: the calls for the next forward.
        rank: of queued requests, the one of the lowest rank is started next.
        beside: the running requests that one has to fit beside.
        in_turns: whether one group goes on until a request of it ends, rather than all by turns.
        kinds_at_work: rows of all running requests, over those of one kind.
    """

    pick: Callable[[Sequence[Parked], CostOf, LimitOf], list[Parked]]
    rank: Callable[[Queued], float]
    beside: Callable[[Queued | Running, Sequence[Running]], Sequence[Running]]
    in_turns: bool = False
    kinds_at_work: int = KINDS_AT_WORK

    def rows_at_work(self, max_rows: int) -> int:
        """How many rows all running requests may have, where forwards have at most so many."""
        return self.kinds_at_work * max_rows

    def has_room(self, item: Queued | Running, running: Sequence[Running], max_rows: int) -> bool:
        """Whether it may be started beside these, where forwards have at most so many rows."""
        return self.lacking(item, running, max_rows, self.rows_at_work(max_rows)) is None

    def lacking(
        self, item: Queued | Running, running: Sequence[Running], of_kind: int, in_all: int
    ) -> Lacking | None:
        """What there is too little of to start it; None if it may be started.

        Beside nobody there is room for one, however large.

        Args:
            of_kind: rows that its kind may have at work.
            in_all: rows that all may have.
        """
        others = self.beside(item, running)
        rows = [other.rows for other in others]
        same = [other.rows for other in others if other.kind == item.kind]
        if rows and sum(rows) + item.rows > in_all:
            return Lacking.ROWS_IN_ALL
        if same and sum(same) + item.rows > of_kind:
            return Lacking.ROWS_OF_ITS_KIND
        return None


SHORTEST_FIRST = Policy(shortest_first, request_due_s, as_urgent, in_turns=True)
DUE_TIME = Policy(pick, request_due_s, as_urgent)
STRICT_FIFO = Policy(strict_fifo, lambda queued: queued.arrival, all_running, kinds_at_work=1)
POLICIES = MappingProxyType(
    {"shortest-first": SHORTEST_FIRST, "due-time": DUE_TIME, "strict-fifo": STRICT_FIFO}
)


def _may_pass(item: Queued, head: Queued, lacking: Lacking) -> bool:
    """Whether one may be started before one that is due sooner and lacks something."""
    if item.priority < head.priority:
        return True
    return lacking is Lacking.ROWS_OF_ITS_KIND and item.kind != head.kind


def _forward_s(group: Sequence[Parked], cost_of: CostOf, limit: int) -> float:
    """Expected seconds of the forward that a group would get, were it to run now."""
    rows = sum(item.call.rows for item in group)
    largest = max(item.call.rows for item in group)
    return cost_of(group[0].call.key, max(min(rows, limit), largest))


def _groups(parked: Iterable[Parked]) -> list[list[Parked]]:
    """Calls that can share a forward, oldest first, and the group of the oldest call first."""
    groups: dict[CallKey, list[Parked]] = {}
    for item in sorted(parked, key=_sequence):
        groups.setdefault(item.call.key, []).append(item)
    return list(groups.values())


def _rank(item: Parked, seconds: float) -> float:
    """Seconds left over the weight: the least goes first."""
    if item.is_step:
        return item.left_s / item.weight
    return patience(item.priority) * seconds * seconds


def _overdue_s(item: Parked, seconds: float) -> float:
    """When a call is passed over no more."""
    return due_s(item.parked_s, HOLD * seconds, item.priority, item.latest_start_s)


def _call_due_s(item: Parked, seconds: float) -> float:
    return due_s(item.parked_s, seconds, item.priority, item.latest_start_s)


def _sequence(item: Parked) -> int:
    return item.call.sequence
