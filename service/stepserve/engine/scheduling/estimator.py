"""What the engine expects of the requests in flight, from what it has measured so far."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from stepserve.domain.states import RequestState
from stepserve.engine.calls.call import Call
from stepserve.engine.calls.call_key import CallShape
from stepserve.engine.scheduling.cost import CostModel
from stepserve.engine.scheduling.demand import Demand
from stepserve.engine.scheduling.forecast import CompletionEstimate, ForwardCost
from stepserve.engine.scheduling.lateness import LatenessQuantile
from stepserve.engine.scheduling.mixing import LengthRows, companies
from stepserve.engine.tracks.track import Stage, Track

LEARNING_RATE = 0.1
MOST_SHARES = 64
# In logarithms: few requests that took far longer than predicted say no more than this.
MOST_STRETCH = 0.35


@dataclass
class Average:
    """An average that forgets: `None` until something was seen."""

    value: float | None = None

    def observe(self, value: float) -> None:
        """Move a little towards what was seen."""
        old = value if self.value is None else self.value
        self.value = old + LEARNING_RATE * (value - old)

    def __float__(self) -> float:
        return self.value or 0.0


@dataclass(frozen=True)
class StepShape:
    """What steps of one size look like.

    Args:
        shape: in the cost model.
        max_rows: their row limit.
        mixes_lengths: whether they may share forwards with longer and shorter rows.
    """

    shape: CallShape
    max_rows: int
    mixes_lengths: bool = False


UNKNOWN = StepShape(CallShape(()), 1)


class CompletionEstimator:
    """Learns what requests of each size take, and predicts when those in flight will end.

    Written by the engine thread only; others may read slightly old values.
    """

    def __init__(self, cost: CostModel | None = None) -> None:
        self.cost = cost or CostModel()
        self.lateness = LatenessQuantile()
        self._shapes: dict[Hashable, StepShape] = {}
        self._latest = UNKNOWN
        self._tick_overhead_s = Average()
        self._other_row_s = Average()
        self._stretches: dict[Hashable, Average] = {}
        # Of denoiser calls, those that run, by kind of step cache; the oldest kinds come first.
        self._shares: dict[str, Average] = {}

    def step_ended(self, track: Track, call: Call) -> None:
        """A denoising step of a track took part in a forward."""
        # Where lengths are not mixed, calls tell theirs in their key.
        mixes_lengths = bool(call.tokens) and not call.key.tokens
        self._latest = StepShape(call.shape, call.method.max_rows, mixes_lengths)
        self._shapes[track.size] = self._latest

    def tick_ended(self, busy_s: float, forward_s: float) -> None:
        """A tick is over; what was not spent in forwards is the engine's and the pipelines'."""
        self._tick_overhead_s.observe(max(busy_s - forward_s, 0.0))

    def track_ended(self, track: Track, now_s: float) -> None:
        """A track is over: learn what requests take apart from their steps."""
        if track.state is RequestState.FINISHED:
            stage_s = track.stage_s
            other_s = sum(stage_s.get(stage, 0.0) for stage in (Stage.ENCODE, Stage.DECODE))
            self._other_row_s.observe(other_s / (track.rows * len(track.phases)))
            self._learn_stretch(track, now_s - track.submitted_s)
            self._learn_share(track)
        # What expired would have ended even later. Without it only those on time would be heeded.
        if track.predicted and track.state in (RequestState.FINISHED, RequestState.EXPIRED):
            self.lateness.observe(track.predicted, now_s)

    def step_costs(self) -> dict[Hashable, tuple[float, float]]:
        """Seconds of a step by size: those of any forward, and those of each row in it."""
        return {size: self._line(step) for size, step in list(self._shapes.items())}

    def run_shares(self) -> dict[str, float]:
        """By kind of step cache, which share of the denoiser calls runs."""
        return {kind: float(share) for kind, share in self._shares.copy().items()}

    def demand(self, track: Track) -> Demand:
        """What is left to do for a track, as all that decides and predicts sees it."""
        now, left_s, serial_s = track.phase, 0.0, 0.0
        later: list[tuple[int, Hashable]] = []
        for number, phase in enumerate(track.phases):
            step_s = self._forward_s(self._step_shape(phase.size).shape, track.rows)
            left = self._runs_left(track, number, track.left_of(number))
            serial_s += self._runs_left(track, number, phase.steps) * step_s
            left_s += left * step_s
            if number > now:
                later.append((left, track.kind_of(phase.size)))
        return Demand(
            track.arrival,
            track.rows_ahead,
            self._runs_left(track, now, track.left_of(now)),
            track.kind,
            track.priority,
            track.submitted_s,
            left_s,
            serial_s,
            track.expires_s - left_s,
            track.state is RequestState.RUNNING,
            tuple(later),
        )

    def forecast(
        self, tracks: Sequence[Track], row_limit: int, one_at_a_time: bool = False
    ) -> CompletionEstimate:
        """What becomes of these tracks if there are no others; the last one is the newcomer.

        Args:
            row_limit: most rows of one denoiser forward.
            one_at_a_time: whether nobody starts before the one that runs has ended.
        """
        demands: list[Demand] = []
        steps: dict[Hashable, StepShape] = {}
        mixable: set[Hashable] = set()
        for track in tracks:
            demand = self.demand(track)
            if one_at_a_time:
                demand = _apart(demand)
            sizes = (phase.size for phase in track.phases[-len(demand.parts) :])
            for part, size in zip(demand.parts, sizes, strict=True):
                # Looked up once: the engine thread may be learning a new shape at this moment.
                steps[part.kind] = step = self._step_shape(size)
                if step.mixes_lengths and track.mixes_lengths and not one_at_a_time:
                    mixable.add(part.kind)
            demands.append(demand)
        longer = self._longer_kinds(demands, {kind: steps[kind] for kind in mixable})
        demands = [_renamed(demand, longer) for demand in demands]
        limit = None if one_at_a_time else row_limit
        costs = {kind: self._cost_of(step, limit) for kind, step in steps.items()}
        return CompletionEstimate(demands, costs.__getitem__, float(self._other_row_s))

    def knows(self, track: Track) -> bool:
        """Whether steps of its sizes were ever measured, so that there is more than a guess."""
        return all(phase.size in self._shapes for phase in track.phases)

    def stretched_s(self, track: Track, predicted_s: float) -> float:
        """What was predicted for a new track, made longer by as much as it usually gets.

        Predictions know nothing of those who come later and share the device.
        """
        track.first_predicted_s = predicted_s
        stretch = self._stretches.get(_kind(track))
        return predicted_s * math.exp(float(stretch or 0.0))

    def _runs_left(self, track: Track, phase: int, calls: int) -> int:
        """How many of the last `calls` denoiser calls of a phase should run."""
        cache = track.step_cache
        if cache is None:
            return calls
        known = cache.runs_left(phase, calls)
        return math.ceil(calls * self._share(cache.kind)) if known is None else known

    def _share(self, kind: str) -> float:
        share = self._shares.get(kind)
        return 1.0 if share is None else float(share)

    def _learn_share(self, track: Track) -> None:
        cache = track.step_cache
        if cache is None or not track.steps_done:
            return
        if cache.kind not in self._shares and len(self._shares) >= MOST_SHARES:
            self._shares.pop(next(iter(self._shares)))
        share = self._shares.setdefault(cache.kind, Average())
        share.observe(1 - track.steps_skipped / track.steps_done)

    def _learn_stretch(self, track: Track, total_s: float) -> None:
        if track.first_predicted_s and total_s > 0:
            log_ratio = math.log(total_s / track.first_predicted_s)
            stretch = self._stretches.setdefault(_kind(track), Average())
            stretch.observe(min(max(log_ratio, -MOST_STRETCH), MOST_STRETCH))

    def _step_shape(self, size: Hashable) -> StepShape:
        return self._shapes.get(size, self._latest)

    def _longer_kinds(
        self, demands: Sequence[Demand], steps: Mapping[Hashable, StepShape]
    ) -> dict[Hashable, Hashable]:
        """By kind, the one that it shares forwards with and whose rows are the longest there.

        Args:
            demands: of all requests, the first of which go first.
            steps: of the kinds whose rows may share a forward with rows of other lengths.
        """
        if len(steps) < 2:
            return {}
        rows: dict[CallShape, int] = {}
        # Of kinds with equally many tokens one stands for all.
        named: dict[CallShape, Hashable] = {}
        in_turn = sorted(demands, key=attrgetter("rank"))
        for part in (part for demand in in_turn for part in demand.parts):
            if part.kind in steps:
                shape = steps[part.kind].shape
                rows[shape] = rows.get(shape, 0) + part.rows
                named.setdefault(shape, part.kind)
        longest = self._longest_shapes(rows, {shape: steps[kind] for shape, kind in named.items()})
        return {
            kind: named[longest[step.shape]]
            for kind, step in steps.items()
            if step.shape in longest
        }

    def _longest_shapes(
        self, rows: Mapping[CallShape, int], steps: Mapping[CallShape, StepShape]
    ) -> dict[CallShape, CallShape]:
        """By shape, the longest that its rows share forwards with."""
        by_form: dict[tuple[Hashable, ...], list[LengthRows]] = {}
        for shape, count in rows.items():
            cost_s = partial(self.cost.predict, shape)
            waiting = LengthRows(shape.length, count, steps[shape].max_rows, cost_s)
            by_form.setdefault(shape.form, []).append(waiting)
        return {
            CallShape(form, length): CallShape(form, max(lengths))
            for form, waiting in by_form.items()
            for lengths in companies(waiting)
            for length in lengths
        }

    def _cost_of(self, step: StepShape, row_limit: int | None) -> ForwardCost:
        limit = step.max_rows if row_limit is None else min(step.max_rows, row_limit)
        line, overhead_s = self.cost.line(step.shape), float(self._tick_overhead_s)
        return ForwardCost(
            line.fixed_s + overhead_s, line.per_row_s, limit, line.least_s + overhead_s
        )

    def _line(self, step: StepShape) -> tuple[float, float]:
        one_s, all_s = (self._forward_s(step.shape, rows) for rows in (1, step.max_rows))
        row_s = (all_s - one_s) / max(step.max_rows - 1, 1)
        return max(one_s - row_s, 0.0), row_s

    def _forward_s(self, shape: CallShape, rows: int) -> float:
        return self.cost.predict(shape, rows) + float(self._tick_overhead_s)


def _kind(track: Track) -> Hashable:
    """Requests of equal kinds are passed over alike: of equal sizes and similar step counts."""
    return tuple((phase.size, phase.steps.bit_length()) for phase in track.phases)


def _renamed(demand: Demand, kinds: Mapping[Hashable, Hashable]) -> Demand:
    """The same with other kinds, where one is given."""
    later = tuple((steps, kinds.get(kind, kind)) for steps, kind in demand.later)
    return demand._replace(kind=kinds.get(demand.kind, demand.kind), later=later)


def _apart(demand: Demand) -> Demand:
    """A demand that shares no forward; the one that runs goes first."""
    later = tuple((steps, (demand.arrival, index)) for index, (steps, _) in enumerate(demand.later))
    left_s = 0.0 if demand.is_started else demand.left_s
    return demand._replace(kind=demand.arrival, left_s=left_s, later=later)
