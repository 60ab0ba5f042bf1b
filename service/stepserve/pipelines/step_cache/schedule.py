"""MagCache: which denoiser calls are skipped follows from magnitudes, before a request begins.

The magnitude of a call is the mean absolute size of its residual (output less input). It changes
from call to call in nearly the same way whatever the prompt, so it is measured once for a model.
How far it has gone since the last call that ran says how wrong that call's output is by now.

https://arxiv.org/abs/2506.09045
"""

from __future__ import annotations

from collections.abc import Sequence

from stepserve.domain.step_cache import FIRST_STEPS

MOST_IN_A_ROW = 3
"""Magnitudes do not tell that residuals turn, so no more calls are skipped one after the other."""


def skipped_calls(
    magnitudes: Sequence[float], calls: int, threshold: float, begin: float = 0.0
) -> frozenset[int]:
    """Return which of a request's denoiser calls are skipped, from 0 on.

    The first calls and the last one always run.

    Args:
        magnitudes: of the calls that were measured, each above 0; at least one. Their number may
            differ from `calls`: a call has the magnitude at its share of the way.
        calls: how many the request makes.
        threshold: the sum of errors of the calls skipped in a row stays below it.
        begin: how much of the way lies before the first call, 0 to 1, as it does where an image is
            begun with.
    """
    part = (1 - begin) / max(calls - 1, 1)
    sizes = [_magnitude_at(magnitudes, begin + part * call) for call in range(calls)]
    skipped: set[int] = set()
    last_run, error = FIRST_STEPS - 1, 0.0
    for call in range(FIRST_STEPS, calls - 1):
        error += abs(1 - sizes[call] / sizes[last_run])
        if error < threshold and call - last_run <= MOST_IN_A_ROW:
            skipped.add(call)
        else:
            last_run, error = call, 0.0
    return frozenset(skipped)


def _magnitude_at(magnitudes: Sequence[float], share: float) -> float:
    """The magnitude at a share of the way, 0 to 1, on straight lines between those measured."""
    place = share * (len(magnitudes) - 1)
    before = min(int(place), max(len(magnitudes) - 2, 0))
    after = min(before + 1, len(magnitudes) - 1)
    return magnitudes[before] + (magnitudes[after] - magnitudes[before]) * (place - before)
