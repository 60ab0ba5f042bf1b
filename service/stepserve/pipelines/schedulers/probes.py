"""What a scheduler can do, tried without a network: every step on a sample of a few numbers.

Schedulers raise, or make numbers that are none, where steps are too many or too few for their noise
schedule; how many that is depends on the class and on the model's settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepserve.domain.models import StepRange
from stepserve.pipelines.schedulers.watch import draw_from

# What goes wrong does so where noise begins or ends, and where two steps have the same noise, which
# multistep solvers divide by the difference of.
END_STEPS = 4
STANDSTILLS = 3
SAMPLE_SHAPE = (1, 1, 2, 2)
LEARNS_VARIANCE = ("learned", "learned_range")
# Two sources of noise, to see which one a scheduler draws from.
SEEDS = (1, 2)

# Flow-matching schedulers that shift their noise by the image's size are given how far.
PROBE_SHIFT = 1.0

MakeScheduler = Callable[[], Any]


class ScheduleError(Exception):
    """A scheduler cannot do what was tried; the message says why."""


def set_steps(scheduler: Any, steps: int) -> None:
    """Prepare a scheduler for that many steps, whatever else its class wants."""
    if getattr(scheduler.config, "use_dynamic_shifting", False):
        scheduler.set_timesteps(steps, mu=PROBE_SHIFT)
    else:
        scheduler.set_timesteps(steps)


def try_ends(make: MakeScheduler, steps: int, done: int = 0) -> None:
    """Try the first and the last of so many steps, and those that the noise stands still at.

    Args:
        make: a fresh scheduler at each call.
        steps: as a request has them.
        done: steps that are left out at the beginning, as a strength below 1 does.

    Raises:
        ScheduleError: the scheduler raises, or makes numbers that are not finite.
    """
    for window in _windows(make, steps, done):
        _walk(make, steps, window)


def try_all(make: MakeScheduler, steps: int) -> None:
    """Try every step, which takes up to a second for a thousand.

    Raises:
        ScheduleError: as `try_ends` does.
    """
    _walk(make, steps, range(steps))


@contextmanager
def _muted() -> Iterator[None]:
    """A warning is no reason to leave a scheduler out, even where warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_muted()
def can_do(make: MakeScheduler, steps: int) -> bool:
    """Whether both ends of so many steps can be done."""
    try:
        try_ends(make, steps)
    except ScheduleError:
        return False
    return True


@_muted()
def draws_from_elsewhere(make: MakeScheduler, steps: int) -> bool:
    """Whether a scheduler draws noise that no generator of the request decides.

    The source that all requests share is left as it was.
    """
    results, before = [], torch.get_rng_state()
    try:
        for seed in SEEDS:
            torch.default_generator.manual_seed(seed)
            state = torch.get_rng_state()
            *_, last = _samples(make, steps, range(steps))
            results.append(last)
            if not torch.equal(state, torch.get_rng_state()):
                return True
    except Exception:
        # It cannot be tried in this way, and nothing else is known against it.
        return False
    finally:
        torch.set_rng_state(before)
    return not torch.equal(*results)


def find_steps(works: Callable[[int], bool], maximum: int, known: Iterable[int]) -> StepRange:
    """The step counts around a known one that work, by halving.

    Args:
        works: whether a step count does.
        maximum: most that are wanted.
        known: counts of which the first that works is where to begin; all of 1 to `maximum` are
            said to work where none of these does, as then something else is wrong.
    """
    begin = next((steps for steps in known if steps <= maximum and works(steps)), None)
    if begin is None:
        return StepRange(1, maximum)
    return StepRange(
        minimum=_furthest(works, begin, 1),
        maximum=_furthest(works, begin, maximum),
    )


def _furthest(works: Callable[[int], bool], good: int, wanted: int) -> int:
    """The step count closest to `wanted` that works, from one that does."""
    if good == wanted or works(wanted):
        return wanted
    bad = wanted
    while abs(bad - good) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if works(middle) else (good, middle)
    return good


def _windows(make: MakeScheduler, steps: int, done: int) -> Iterator[range]:
    """The steps that are worth trying, counted from 0."""
    if steps - done <= 2 * END_STEPS:
        yield range(done, steps)
        return
    yield range(done, done + END_STEPS)
    yield range(steps - END_STEPS, steps)
    for place in _standstills(make, steps)[:STANDSTILLS]:
        if done < place:
            yield range(max(place - END_STEPS // 2, done), min(place + END_STEPS, steps))


def _standstills(make: MakeScheduler, steps: int) -> list[int]:
    """Steps that begin with as much noise as the step after them."""
    with _explaining():
        scheduler = make()
        set_steps(scheduler, steps)
        noise = torch.as_tensor(getattr(scheduler, "sigmas", scheduler.timesteps))
    # The second halves of schedulers of the second order begin where the first ones do.
    noise = noise[:: scheduler.order]
    return [int(place) for place in (noise[1:] == noise[:-1]).nonzero()]


def _walk(make: MakeScheduler, steps: int, window: range) -> None:
    with _explaining():
        for number, sample in enumerate(_samples(make, steps, window), window.start + 1):
            if not bool(torch.isfinite(sample).all()):
                raise ScheduleError(f"its numbers are not finite at step {number}")


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except ScheduleError:
        raise
    except Exception as error:
        raise ScheduleError(f"{type(error).__name__}: {error}") from error


def _samples(make: MakeScheduler, steps: int, window: range) -> Iterator[Tensor]:
    """The sample after each of these steps, of a model whose answer is always the same."""
    scheduler, generator = make(), torch.Generator().manual_seed(0)
    draw_from(scheduler, [generator])
    set_steps(scheduler, steps)
    order = scheduler.order
    if window.start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(window.start * order)
    # Flow matching has no such method, as the model's input is the sample itself.
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    answer = _answer(scheduler)
    sample = torch.randn(SAMPLE_SHAPE, generator=generator)
    # Some have more timesteps than steps: the last step has all that are left.
    last = None if window.stop == steps else window.stop * order
    for timestep in scheduler.timesteps[window.start * order : last]:
        scale(sample, timestep)
        sample = scheduler.step(answer, timestep, sample, return_dict=False)[0]
        yield sample


def _answer(scheduler: Any) -> Tensor:
    answer = torch.full(SAMPLE_SHAPE, 0.1)
    # Such models say the variance as well, in channels of its own.
    learns = getattr(scheduler.config, "variance_type", None) in LEARNS_VARIANCE
    return torch.cat([answer, 0 * answer], dim=1) if learns else answer
