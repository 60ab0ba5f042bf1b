"""The rule of the step cache in a plain loop: written down a second time, apart from the engine.

It stands around the modules of one ordinary pipeline call. An evaluation is what one step of the
scheduler needs: control networks, and one call of the denoiser or several. Solvers that evaluate
twice for each of their steps have two stages, which know nothing of one another.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CONTROL = "controlnet"
TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t")
FIRST = 3


@dataclass(frozen=True)
class Decision:
    """What decides whether an evaluation runs.

    Args:
        threshold: the expected relative error that may add up; None where a schedule decides.
        skipped: the evaluations that a schedule skips.
    """

    threshold: float | None = None
    skipped: frozenset[int] = frozenset()


@dataclass
class Known:
    """What was computed in one stage since its rows last changed.

    Args:
        error: what has added up since the last evaluation that ran.
        inputs: of each evaluation that ran: of its first call.
        outputs: the same of the denoiser's first call.
        calls: timestep and output of each call that ran, by its name and number in an evaluation.
    """

    error: float = 0.0
    inputs: list[list[Tensor]] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)
    calls: dict[tuple[str, int], list[tuple[float, Any]]] = field(default_factory=dict)

    @property
    def can_tell(self) -> bool:
        """Whether two outputs say where the next one will be."""
        return len(self.outputs) >= FIRST and len(set(map(forms, self.outputs[-2:]))) == 1

    def expected_error(self, inputs: list[Tensor]) -> float:
        """Of an output that is told for these inputs."""
        (x, last_x), (v, last_v) = self.inputs[-2:], self.outputs[-2:]
        change = distance(last_v, v) / mean([value.abs() for value in last_v])
        return change * distance(inputs, last_x) / distance(last_x, x)


class PlainStepCache:
    """Skips evaluations of one pipeline call, and keeps which of them ran.

    Args:
        evaluations: that the pipeline call has.
        order: how many of them a step of its solver takes.
        decision: what skips them.
    """

    def __init__(self, evaluations: int, order: int, decision: Decision) -> None:
        self.evaluations, self.order, self.decision = evaluations, order, decision
        self.ran: list[bool] = []
        self.calls: list[tuple[str, float]] = []
        self._stages = [Known() for _ in range(order)]
        self._met: Counter[str] = Counter()

    def ended(self) -> None:
        """The scheduler has made its step."""
        self._met.clear()

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of a module: it runs, or its output is told from earlier ones."""
        # A view of a module may add arguments that its signature does not name.
        named = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
        inputs = tensors(named[next(iter(inspect.signature(forward).parameters))])
        times = [torch.as_tensor(named[time]) for time in TIMESTEPS if time in named]
        timestep = float(times[0].max())
        if not self._met:
            self._begin(inputs)
        place = name, self._met[name]
        self._met[name] += 1
        known = self._stages[(len(self.ran) - 1) % self.order]
        calls = known.calls.setdefault(place, [])
        if not self.ran[-1]:
            return calls[-1][1] if name == CONTROL else line(calls[-2], calls[-1], timestep)
        output = forward(*args, **kwargs)
        self.calls.append((name, timestep))
        calls.append((timestep, output))
        if name != CONTROL and place[1] == 0:
            known.outputs.append(tensors(output))
        return output

    def _begin(self, inputs: list[Tensor]) -> None:
        """Decide of the evaluation whose first call has these inputs."""
        number = len(self.ran)
        stage = number % self.order
        known = self._stages[stage]
        if known.inputs and forms(known.inputs[-1]) != forms(inputs):
            known = self._stages[stage] = Known()
        is_last = number + self.order >= self.evaluations
        may_skip = number >= FIRST * self.order and not is_last and known.can_tell
        self.ran.append(not (may_skip and self._skips(known, number, inputs)))
        if self.ran[-1]:
            known.error = 0.0
            known.inputs.append(inputs)

    def _skips(self, known: Known, number: int, inputs: list[Tensor]) -> bool:
        if self.decision.threshold is None:
            return number in self.decision.skipped
        known.error += known.expected_error(inputs)
        return known.error < self.decision.threshold


def line(one: tuple[float, Any], other: tuple[float, Any], timestep: float) -> Any:
    """The output at a timestep on the straight line through two."""
    (before, output_before), (last, output) = one, other
    if last == before:
        return output
    share = (timestep - last) / (last - before)
    leaves, structure = pytree.tree_flatten(output)
    pairs = zip(leaves, pytree.tree_leaves(output_before), strict=True)
    return pytree.tree_unflatten(
        [beyond(v, v0, share) if isinstance(v, Tensor) else v for v, v0 in pairs], structure
    )


def beyond(last: Tensor, before: Tensor, share: float) -> Tensor:
    """What comes after two tensors, so many of their distances further on."""
    one, other = (
        value if value.dtype == torch.float64 else value.float() for value in (last, before)
    )
    return (one + (one - other) * share).to(last.dtype)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def forms(values: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    """The shapes of several tensors."""
    return tuple(value.shape for value in values)


def mean(values: Sequence[Tensor]) -> float:
    """Of all numbers in several tensors."""
    return float(torch.cat([value.double().reshape(-1) for value in values]).mean())


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The mean of the absolute differences."""
    return mean([(a.double() - b.double()).abs() for a, b in zip(some, others, strict=True)])


@contextmanager
def skipping(
    scheduler: Any, modules: Mapping[str, nn.Module], evaluations: int, decision: Decision
) -> Iterator[PlainStepCache]:
    """Until the end of the block a call of a pipeline skips.

    Args:
        scheduler: of that pipeline alone.
        modules: what it calls at each step, by the names of components.
        evaluations: how often the scheduler will step.
        decision: what is skipped.
    """
    cache = PlainStepCache(evaluations, getattr(scheduler, "order", 1), decision)
    with ExitStack() as undo:
        for name, module in modules.items():
            undo.enter_context(replaced(module, "forward", partial(stand_in, cache, name)))
        undo.enter_context(replaced(scheduler, "step", partial(then, cache.ended)))
        yield cache


@contextmanager
def replaced(owner: Any, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Until the end of the block a method of one object is another one."""
    own = vars(owner).get(name)
    setattr(owner, name, change(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


def stand_in(cache: PlainStepCache, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that asks the cache."""

    @functools.wraps(forward)
    def cached(*args: Any, **kwargs: Any) -> Any:
        return cache.call(name, forward, args, kwargs)

    return cached


def then(tell: Callable[[], None], step: Callable[..., Any]) -> Callable[..., Any]:
    """A function after which something is told."""

    @functools.wraps(step)
    def told(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        tell()
        return result

    return told
