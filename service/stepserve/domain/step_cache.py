"""Step caches: which denoiser calls of a request are skipped, as their output can be predicted.

What is skipped takes no row of a forward. It changes the image a little, so it is off unless a
request or its model asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

LEAST_THRESHOLD, MOST_THRESHOLD = 0.001, 1.0

FIRST_STEPS = 3
"""These always run: they decide what the image shows."""

OFF = "off"
"""What requests say, and images tell, in place of a step cache where there is none."""


class StepCacheMethod(StrEnum):
    """What decides which calls are skipped."""

    EASYCACHE = "easycache"
    """How much inputs and outputs of the request's own earlier calls changed.

    https://arxiv.org/abs/2507.02860
    """

    MAGCACHE = "magcache"
    """A schedule that follows from magnitudes measured once for the model.

    https://arxiv.org/abs/2506.09045
    """

    @property
    def usual_threshold(self) -> float:
        """Of who says none; the errors of the two methods are not of one kind."""
        return 0.15 if self is StepCacheMethod.EASYCACHE else 0.02


@dataclass(frozen=True)
class StepCacheUse:
    """The step cache of a request.

    Args:
        method: what decides.
        threshold: the expected relative error that may add up until a call has to run: the larger,
            the fewer calls run, and the further the image is from that of all.
    """

    method: StepCacheMethod = StepCacheMethod.EASYCACHE
    threshold: float = StepCacheMethod.EASYCACHE.usual_threshold

    @classmethod
    def of(cls, method: StepCacheMethod, threshold: float | None) -> StepCacheUse:
        """With the usual threshold of the method where none is said."""
        return cls(method, method.usual_threshold if threshold is None else threshold)
