"""Whether to take on more work. Pure: everything it looks at is an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from stepserve.domain.errors import ServerFullError, UnmeetableDeadlineError
from stepserve.engine.scheduling.forecast import CompletionEstimate
from stepserve.engine.scheduling.lateness import LatenessQuantile

MINIMUM_RETRY_S = 1.0


@dataclass(frozen=True)
class Ending:
    """A request in flight will be finished in `seconds`, and with it so many images."""

    seconds: float
    images: int


@dataclass(frozen=True)
class Load:
    """Work in flight: requests accepted and not yet ended, their images, and seconds to do it."""

    requests: int
    images: int
    backlog_s: float


def load_of(endings: Sequence[Ending]) -> Load:
    """Everything in flight, summed up."""
    return Load(
        requests=len(endings),
        images=sum(ending.images for ending in endings),
        backlog_s=max((ending.seconds for ending in endings), default=0.0),
    )


def check_room(endings: Sequence[Ending], images: int, limit: int) -> None:
    """Let a request for `images` images in, or refuse it.

    Images are counted rather than requests, because they are what takes memory and time. An
    empty server takes any request.

    Args:
        endings: of everything in flight.

    Raises:
        ServerFullError: more than `limit` images would be in flight; `retry_after_s` is the time
            until so many of them should be finished that this request would be let in.
    """
    in_flight = sum(ending.images for ending in endings)
    if endings and in_flight + images > limit:
        raise ServerFullError(
            f"queue full: {in_flight} of {limit} images pending, {images} more requested",
            retry_after_s=max(_room_s(endings, in_flight + images - limit), MINIMUM_RETRY_S),
        )


def check_deadline(
    estimate: CompletionEstimate, lateness: LatenessQuantile, deadline_s: float, doubt: float = 1.0
) -> None:
    """Let a newcomer in if its own deadline can be promised, or refuse it.

    Args:
        doubt: how many times too long the forecast may be; then only what is beyond that is
            refused.

    Raises:
        UnmeetableDeadlineError: it cannot; `retry_after_s` is the time until it should be let in.
    """
    safe_s = lateness.safe_s(estimate.finish_s[-1], estimate.forward_s)
    if safe_s <= doubt * deadline_s:
        return
    serial_s = _serial_s(estimate, lateness)
    if serial_s > deadline_s:
        reason, wait_s = f"estimated {serial_s:.3g} s even with no other requests", math.inf
    else:
        reason = f"estimated {safe_s:.3g} s under current load"
        wait_s = _wait_s(estimate, lateness, deadline_s)
    message = f"cannot meet deadline_s={deadline_s:g}: {reason}"
    raise UnmeetableDeadlineError(message, max(wait_s, MINIMUM_RETRY_S), safe_s)


def check_promises(
    estimate: CompletionEstimate, lateness: LatenessQuantile, left_s: Sequence[float]
) -> None:
    """Let a newcomer in if everyone in flight still meets its deadline, or refuse it.

    A promise that cannot be kept any more, newcomer or not, keeps nobody out.

    Args:
        left_s: seconds until the deadline of each in flight; infinite where there is none.

    Raises:
        ServerFullError: some would miss theirs; `retry_after_s` is when those should be finished.
    """
    forward_s, in_flight = estimate.forward_s, estimate.finish_s[:-1]
    at_risk = [
        lateness.safe_s(s, forward_s) > left for s, left in zip(in_flight, left_s, strict=True)
    ]
    if not any(at_risk):
        return
    risks = list(compress(zip(estimate.without_s(), left_s, strict=True), at_risk))
    kept_s = [without_s for without_s, left in risks if without_s <= left]
    if kept_s:
        raise ServerFullError(
            f"queue full: with this request, {len(kept_s)} of those in flight could miss their "
            "deadlines",
            retry_after_s=max(*kept_s, MINIMUM_RETRY_S),
        )


def _serial_s(estimate: CompletionEstimate, lateness: LatenessQuantile) -> float:
    alone = estimate.serial()
    return lateness.safe_s(alone.finish_s[-1], alone.forward_s)


def _wait_s(estimate: CompletionEstimate, lateness: LatenessQuantile, deadline_s: float) -> float:
    """When a newcomer that can be promised alone could be promised beside what is then in flight.

    Each second of waiting gains at most a second: what is too late after one trial is added.
    """
    forward_s = estimate.forward_s
    wait_s = lateness.safe_s(estimate.finish_s[-1], forward_s) - deadline_s
    return wait_s + max(lateness.safe_s(estimate.later_s(wait_s), forward_s) - deadline_s, 0.0)


def _room_s(endings: Sequence[Ending], too_many: int) -> float:
    """When `too_many` images are finished, or all, if that is not enough."""
    seconds = 0.0
    for ending in sorted(endings, key=lambda item: item.seconds):
        seconds = ending.seconds
        too_many -= ending.images
        if too_many <= 0:
            break
    return seconds
