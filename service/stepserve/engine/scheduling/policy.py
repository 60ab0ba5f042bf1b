"""Who goes next: which parked calls share the next forward, and which request is started next.

Pure: costs and limits are arguments. There is one policy, SHORTEST_FIRST. (`loadtests.policies` has
two others to compare it with.)

Users mind waiting in proportion to what they asked for, so a second of
waiting weighs 1 / (patience * seconds that the request takes alone), where the patience is that of
its priority: an eighth for interactive work, 1 for normal, 8 for batch. The least weighted waiting
in all comes from Smith's rule (W. E. Smith, 1956): what has the least time left for its weight goes
first. So

- among groups (calls that can share a forward) the one runs that holds the call
  with the least `seconds left * seconds alone * patience`; what is no denoising step counts as if
  its request were nothing else, so that a newcomer's text encoder goes ahead of the step that all
  wait for, and the newcomer joins that very step;
- in a group the rows are filled in that order. Sharing makes a step longer for those in front,
  and spares one for those behind: of the line's front and rest, the front goes by itself where
  what it gains is worth at least twice what the rest and all others lose (`front_of`);
- where rows of several lengths may share a forward, it is for those of the call that goes first,
  and for all of other lengths that had better go along (`mixing`);
- nothing starves. A call that waited for `HOLD * patience * seconds of its forward` is overdue, and
  so is one whose latest start for its request's deadline has come. Overdue calls go before others,
  first those overdue the longest.

A queued request is due `patience * seconds of all its steps` after it was submitted, or at its
latest start if that is sooner. What is due first is started first, while its rows fit beside those
that running requests of at least its priority will still take; the rows of lower ones it may take.
They stay parked, and go on later exactly where they stood. Rows count among requests of its kind,
which it can share forwards with: others neither fill nor lengthen these. So each kind gets large
forwards on a mixed load; but all together have at most `KINDS_IN_FLIGHT` forwards' rows, as each
that runs gets a step now and then and what is started need not wait for the rest. Behind one that
does not fit yet, only requests of higher priority (or of another kind, where it is the rows of its
own that it waits for) are started, and only while they leave it its rows: so neither do the old
block the urgent, nor the urgent starve them. A short request is started before long ones that were
submitted a little earlier.

Nothing starves. Let call x be parked at t with patience p, let C be the largest expected cost of
a forward with its key, F the longest forward and A the number of running tracks; let H be `HOLD`.
x is overdue by t + H * p * C. Nobody is overdue before being parked, so a call parked after that
is overdue later still, whatever its priority and deadline, and no group is led by it while x waits.
What leads a group before x is therefore parked by t + H * p * C: besides the forward that runs at
that moment these are at most A - 1 calls, one for each other track, and each goes once. Hence x
starts no later than

    t + H * p * C + A * F

Where lengths are mixed, C is the largest cost of a forward for rows of its length only: when x is
overdue follows from that (`_serial_s`). What else goes along with the call that leads makes
forwards longer, which F counts, and their number no larger.

however many urgent or cheap newcomers arrive. Counted in ticks: after t + H * p * C at most A.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import accumulate
from operator import itemgetter

from stepserve.engine.calls.call import Call, longest
from stepserve.engine.calls.sharing import sharing_groups
from stepserve.engine.scheduling.demand import Demand, due_s, patience
from stepserve.engine.scheduling.mixing import LengthRows, lengths_together

CostOf = Callable[[Call, int], float]
"""Seconds of a forward with so many rows, none longer than those of that call."""
LimitOf = Callable[[Call], int]
"""Most rows of such a forward."""

DENOISE = "denoise"
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
# Rows of all running requests, over those of one kind.
KINDS_IN_FLIGHT = 3


@dataclass(frozen=True)
class Parked:
    """A call of a request that waits for a forward since `parked_s` on the engine's clock."""

    call: Call
    parked_s: float
    demand: Demand

    @property
    def is_step(self) -> bool:
        """Whether it is a denoising step, of which its request has more."""
        return self.call.method.stage == DENOISE


class Lacking(Enum):
    """What a request waits for that cannot be started yet."""

    ROWS_OF_ITS_KIND = "rows of its kind"
    ROWS_IN_ALL = "rows in all"


def method_limit(call: Call) -> int:
    """The row limit that the method was given."""
    return call.method.max_rows


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
    for group in groups(parked):
        seconds = _serial_s(group, cost_of, limit_of)
        ranks = sorted(
            ((_rank(item, seconds[item.call.length]), item) for item in group), key=itemgetter(0)
        )
        line = [item for _, item in ranks]
        ranked.append((ranks[0][0], line))
        due = {item.call.sequence: _overdue_s(item, seconds[item.call.length]) for item in group}
        late = [item for item in group if due[item.call.sequence] <= now_s]
        if late:
            late.sort(key=lambda item: due[item.call.sequence])
            in_time = [item for item in line if due[item.call.sequence] > now_s]
            overdue.append((due[late[0].call.sequence], late + in_time))
    _, line = min(overdue or ranked, key=itemgetter(0))
    fitting = fit_rows(going_along(line, cost_of, limit_of), limit_of)
    if overdue or not line[0].is_step:
        return fitting
    count = front_of(fitting, sum(item.demand.weight for item in parked), cost_of)
    # Fewer rows may gain less by being mixed.
    return going_along(fitting[:count], cost_of, limit_of)


def going_along(line: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf) -> list[Parked]:
    """Those of a line, who may share a forward, that had better do so with its first."""
    of_length = _by_length(line)
    if len(of_length) == 1:
        return list(line)
    waiting = [
        LengthRows(
            length,
            _rows(items),
            limit_of(items[0].call),
            partial(cost_of, items[0].call),
        )
        for length, items in of_length.items()
    ]
    together = lengths_together(waiting, line[0].call.length)
    return [item for item in line if item.call.length in together]


def front_of(line: Sequence[Parked], all_weights: float, cost_of: CostOf) -> int:
    """How many of a line had better go without the rest; all of them where none should.

    A front of cost f leaves a rest of cost r, where both together cost c: each in front ends its
    step by c - f sooner, and everybody else, in the line or not, goes on by f + r - c later.

    Args:
        line: those who may share a forward; the least left to do comes first.
        all_weights: the sum over all that wait, in the line or not.
    """
    weights = [item.demand.weight for item in line]
    calls = [item.call for item in line]
    # The longest of each front, and of each rest.
    in_front = list(accumulate(calls, _longer))
    behind = list(accumulate(reversed(calls), _longer))[::-1]
    all_rows = _rows(line)
    together_s = cost_of(in_front[-1], all_rows)
    best, chosen = 0.0, len(line)
    front_rows, front_weight = 0, 0.0
    heaviest_behind = list(accumulate(reversed(weights), max))[::-1]
    for count in range(1, len(line)):
        front_rows += calls[count - 1].rows
        front_weight += weights[count - 1]
        if weights[count - 1] < CLEARLY * heaviest_behind[count]:
            continue
        front_s = cost_of(in_front[count - 1], front_rows)
        lost_s = front_s + cost_of(behind[count], all_rows - front_rows) - together_s
        if not LEAST_LOST <= lost_s / together_s <= MOST_LOST:
            continue
        gain = front_weight * (together_s - front_s) - WORTH * (all_weights - front_weight) * lost_s
        if gain > best:
            best, chosen = gain, count
    return chosen


def fit_rows(line: Sequence[Parked], limit_of: LimitOf) -> list[Parked]:
    """The first calls whose rows fit into one forward; at least one, however large."""
    limit = limit_of(longest([item.call for item in line]))
    chosen: list[Parked] = []
    rows = 0
    for item in line:
        if chosen and rows + item.call.rows > limit:
            break
        chosen.append(item)
        rows += item.call.rows
    return chosen


def next_to_start(
    queued: Sequence[Demand], running: Sequence[Demand], max_rows: int, policy: Policy
) -> Demand | None:
    """The queued request to be started now, if there is room for any.

    Args:
        max_rows: of a forward.
    """
    line = list(queued)
    of_kind: dict[Hashable, int] = defaultdict(lambda: max_rows)
    in_all = policy.rows_in_flight(max_rows)
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


def as_urgent(queued: Demand, running: Sequence[Demand]) -> Sequence[Demand]:
    """Running requests that are at least as urgent."""
    return [item for item in running if item.priority <= queued.priority]


@dataclass(frozen=True)
class Policy:
    """One way to decide.

    Args:
        pick: the calls for the next forward.
        rank: of queued requests, the one of the lowest rank is started next.
        beside: the running requests that one has to fit beside.
        kinds_in_flight: rows of all running requests, over those of one kind.
    """

    pick: Callable[[Sequence[Parked], CostOf, LimitOf], list[Parked]]
    rank: Callable[[Demand], float]
    beside: Callable[[Demand, Sequence[Demand]], Sequence[Demand]]
    kinds_in_flight: int = KINDS_IN_FLIGHT

    def rows_in_flight(self, max_rows: int) -> int:
        """How many rows all running requests may have, where forwards have at most so many."""
        return self.kinds_in_flight * max_rows

    def has_room(self, item: Demand, running: Sequence[Demand], max_rows: int) -> bool:
        """Whether it may be started beside these, where forwards have at most so many rows."""
        return self.lacking(item, running, max_rows, self.rows_in_flight(max_rows)) is None

    def lacking(
        self, item: Demand, running: Sequence[Demand], of_kind: int, in_all: int
    ) -> Lacking | None:
        """What there is too little of to start it; None if it may be started.

        Beside nobody there is room for one, however large.

        Args:
            of_kind: rows that its kind may have in flight.
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


SHORTEST_FIRST = Policy(shortest_first, lambda queued: queued.due_s, as_urgent)


def _may_pass(item: Demand, head: Demand, lacking: Lacking) -> bool:
    """Whether one may be started before one that is due sooner and lacks something."""
    if item.priority < head.priority:
        return True
    return lacking is Lacking.ROWS_OF_ITS_KIND and item.kind != head.kind


def forward_s(group: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf) -> float:
    """Expected seconds of the forward that a group would get, were it to run now."""
    call = longest([item.call for item in group])
    most = max(item.call.rows for item in group)
    return cost_of(call, max(min(_rows(group), limit_of(call)), most))


def groups(parked: Iterable[Parked]) -> list[list[Parked]]:
    """Calls that can share a forward, oldest first, and the group of the oldest call first."""
    item_of = {item.call: item for item in sorted(parked, key=_sequence)}
    return [[item_of[call] for call in group] for group in sharing_groups(item_of)]


def _serial_s(group: Sequence[Parked], cost_of: CostOf, limit_of: LimitOf) -> dict[int, float]:
    """Expected seconds of a forward for the rows of each length in a group."""
    return {
        length: forward_s(items, cost_of, limit_of) for length, items in _by_length(group).items()
    }


def _by_length(line: Iterable[Parked]) -> dict[int, list[Parked]]:
    found: dict[int, list[Parked]] = {}
    for item in line:
        found.setdefault(item.call.length, []).append(item)
    return found


def _rows(line: Iterable[Parked]) -> int:
    return sum(item.call.rows for item in line)


def _longer(one: Call, other: Call) -> Call:
    return one if one.length >= other.length else other


def _rank(item: Parked, seconds: float) -> float:
    """The least goes first."""
    return item.demand.rank if item.is_step else patience(item.demand.priority) * seconds * seconds


def _overdue_s(item: Parked, seconds: float) -> float:
    """When a call is passed over no more."""
    return due_s(item.parked_s, HOLD * seconds, item.demand.priority, item.demand.latest_start_s)


def _sequence(item: Parked) -> int:
    return item.call.sequence
