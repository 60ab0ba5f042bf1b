"""Which denoiser calls of a request are skipped, as their output can be predicted.

A step is one timestep: the calls that the pipeline makes there, of the denoiser (two where guidance
calls twice) and of what runs beside it, such as ControlNets. The first of them decides for all.
What is skipped takes no row of a forward; its output is predicted from the request's own history,
so that neighbours in a batch have no part in it.

With no schedule known beforehand the decision is EasyCache's (https://arxiv.org/abs/2507.02860). Of
the input x and the output v of the last steps that ran, c the latest and b the one before, a step
with the input x adds

    |x - x_c| / |x_c - x_b| * |v_c - v_b| / |v_c|

to the error that adds up since c, where |.| is the sum of absolute values. It is skipped while the
error is below the threshold. x is what the step's first call is to denoise, v what the denoiser's
first call gave. (The paper adds up changes from step to step. Those since c grow faster the longer
ago c is, as the error of a straight line does.)

Outputs are predicted by a straight line in the timestep through v_b and v_c. Those of ControlNets
and T2I-Adapters are repeated: they are for denoiser calls that are skipped as well, so that nobody
looks at them.

Solvers that look at each step from two places (Heun's, KDPM2) have a history for each of the two.
The first three steps of each history run, and so does the last step of each in a phase. A history
begins anew with each phase, and where rows, shapes or methods change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepserve.domain.step_cache import FIRST_STEPS, StepCacheUse
from stepserve.engine.calls.call import Call
from stepserve.engine.tracks.step_history import (
    History,
    Predicted,
    Repeated,
    Scalar,
    distance,
    ratio,
    sample_of,
    timestep_of,
)

DENOISE = "denoise"


@dataclass(frozen=True)
class CachedPhase:
    """How the denoiser is called in one phase of a request.

    Args:
        calls: of the denoiser, in all.
        calls_per_step: of the denoiser; 2 where guidance calls twice.
        order: of the solver: steps that belong together, each of which has a history of its own.
        skipped: steps that are skipped, where that is known beforehand; None: it depends.
    """

    calls: int
    calls_per_step: int = 1
    order: int = 1
    skipped: frozenset[int] | None = None

    @property
    def steps(self) -> int:
        """Timesteps of the solver."""
        return -(-self.calls // self.calls_per_step)

    # Looked up at every tick.
    @cached_property
    def runs(self) -> frozenset[int] | None:
        """Numbers of the denoiser calls that run, where that is known beforehand."""
        skipped = self.skipped
        if skipped is None:
            return None
        steps = [
            step for step in range(self.steps) if not (step in skipped and self.may_skip(step))
        ]
        each = range(self.calls_per_step)
        return frozenset(step * self.calls_per_step + number for step in steps for number in each)

    def may_skip(self, step: int) -> bool:
        """Whether a step is not among the first or the last ones, which always run."""
        return FIRST_STEPS * self.order <= step < self.steps - self.order


@dataclass(eq=False)
class Decision:
    """Whether a step is skipped.

    Args:
        skips: whether it is; False until that is known.
        change: from the sample of the step of its history that ran last, to that of this one.
        error: what the expected error adds up to if it is skipped, once it was read.
        unread: the same while it is on a device.
        threshold: it is skipped if the error is below.
    """

    skips: bool = False
    change: Scalar | None = None
    error: float = 0.0
    unread: Tensor | None = None
    threshold: float = 0.0

    @classmethod
    def by_error(cls, error: Scalar, threshold: float, change: Scalar) -> Decision:
        """One that the expected error decides."""
        if isinstance(error, Tensor):
            return cls(change=change, unread=error, threshold=threshold)
        return cls(error < threshold, change, error)

    def read(self, error: float) -> None:
        """The error has come from the device."""
        self.unread, self.error, self.skips = None, error, error < self.threshold


def read_decisions(decisions: Sequence[Decision]) -> None:
    """Read those that are not known yet, all at once: this waits for the device."""
    unknown = [(one, one.unread) for one in decisions if one.unread is not None]
    if unknown:
        errors = torch.stack([unread for _, unread in unknown]).tolist()
        for (decision, _), error in zip(unknown, errors, strict=True):
            decision.read(error)


# A tuple, as one is made for each call.
class Pending(NamedTuple):
    """A call of a step that waits to be run, or to be skipped.

    Args:
        decision: of its step.
        timestep: of the call.
        sample: what it is to denoise; None unless it is the first of its method at the step.
        place: which call of a step it is.
        history: that it adds to, or is predicted from.
        is_denoiser: whether it is no control.
        decides: whether the decision was made for it, as the first call of its step.
    """

    decision: Decision
    timestep: Scalar
    sample: Sequence[Tensor] | None
    place: Hashable
    history: History
    is_denoiser: bool
    decides: bool

    def predict(self) -> Any:
        """The output of a call that is skipped."""
        self.history.error = self.decision.error
        return self.history.outputs[self.place].at(self.timestep)

    def learn(self, output: Any) -> None:
        """The call has run, and given this."""
        history = self.history
        outputs = history.outputs.get(self.place)
        if outputs is None:
            outputs = Predicted() if self.is_denoiser else Repeated()
            history.outputs[self.place] = outputs
        outputs.learn(self.timestep, output)
        if self.sample is None:
            return
        change = self.decision.change if self.decides else None
        history.learn_input(self.place, self.sample, change)
        if isinstance(outputs, Predicted):
            history.steps, history.error = history.steps + 1, 0.0
            history.output_change = None if outputs.line is None else outputs.line.change()


class StepCache:
    """The step cache of one track; its calls ask it in their order.

    Args:
        use: what the request asks for.
        phases: that it goes through.
        kind: tracks of one kind skip about as many calls.
    """

    def __init__(self, use: StepCacheUse, phases: Sequence[CachedPhase], kind: str = "") -> None:
        self.use = use
        self.phases = phases
        self.kind = kind
        self._number = 0
        self._current = _PhaseState(phases[0], use.threshold)

    def runs_left(self, phase: int, calls: int) -> int | None:
        """How many of the last `calls` denoiser calls of a phase run; None: that depends."""
        runs = self.phases[phase].runs
        if runs is None:
            return None
        return sum(number >= self.phases[phase].calls - calls for number in runs)

    def expect(self, call: Call) -> Pending:
        """A call of the denoiser, or of what runs beside it, is about to park."""
        if self._current.is_over and self._number + 1 < len(self.phases):
            self._number += 1
            self._current = _PhaseState(self.phases[self._number], self.use.threshold)
        return self._current.expect(call)


class _PhaseState:
    """How far one phase is, and what its steps gave."""

    def __init__(self, phase: CachedPhase, threshold: float) -> None:
        self._phase = phase
        self._threshold = threshold
        # Denoiser calls of the phase, and by method those of controls since the last one.
        self._calls = 0
        self._beside: Counter[str] = Counter()
        self._histories = [History() for _ in range(phase.order)]
        # Of the latest step.
        self._step = -1
        self._decision = Decision()
        self._timestep: Scalar = 0.0
        # Whether each step has had as many calls as was expected.
        self._is_regular = True

    @property
    def is_over(self) -> bool:
        """Whether all of its denoiser calls were made."""
        return self._calls >= self._phase.calls

    def expect(self, call: Call) -> Pending:
        """A call is about to park."""
        name, number, is_denoiser = call.method.name, self._calls, call.method.stage == DENOISE
        step, lane = divmod(number, self._phase.calls_per_step)
        place = name, lane, self._beside[name]
        self._count(name, is_denoiser)
        sample = (sample_of(call) or None) if place[1:] == (0, 0) else None
        timestep = timestep_of(call, step)
        if is_denoiser:
            self._check_timestep(timestep, lane)
        decides = step != self._step
        if decides:
            self._step, self._decision = step, self._decide(place, sample or [], step)
        return Pending(
            self._decision if self._can_predict(place, step) else Decision(),
            timestep,
            sample,
            place,
            self._histories[step % self._phase.order],
            is_denoiser,
            decides,
        )

    def _count(self, name: str, is_denoiser: bool) -> None:
        if is_denoiser:
            self._calls += 1
            self._beside.clear()
        else:
            self._beside[name] += 1

    def _check_timestep(self, timestep: Scalar, lane: int) -> None:
        """Skip nothing from now on if a call is not at the timestep of its step.

        Then it belongs to another step: some guiders call more often at some steps.
        """
        if lane == 0:
            self._timestep = timestep
        elif isinstance(timestep, float) and timestep != self._timestep:
            self._is_regular, self._decision = False, Decision()

    def _can_predict(self, place: Hashable, step: int) -> bool:
        outputs = self._histories[step % self._phase.order].outputs.get(place)
        return outputs is not None and outputs.is_known

    def _decide(self, place: Hashable, sample: Sequence[Tensor], step: int) -> Decision:
        """Whether a step is skipped, by what its first call is to denoise."""
        number = step % self._phase.order
        history = self._histories[number]
        inputs = history.inputs.get(place)
        if inputs is None or not inputs.fits(sample):
            self._histories[number] = History()
            return Decision()
        is_known = self._is_regular and history.steps >= FIRST_STEPS
        if not is_known or not self._phase.may_skip(step):
            return Decision()
        if not self._can_predict(place, step) or history.output_change is None:
            return Decision()
        if self._phase.skipped is not None:
            return Decision(step in self._phase.skipped)
        if inputs.change is None:
            return Decision()
        change = distance(sample, inputs.sample)
        error = ratio(change, inputs.change) * history.output_change + history.error
        return Decision.by_error(error, self._threshold, change)
