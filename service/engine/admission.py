"""Whether to take on more work. Pure: everything it looks at is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from service.domain.errors import ServerFullError

SecondsPerRow = float
MINIMUM_RETRY_S = 1.0


@dataclass(frozen=True)
class Load:
    """Work in hand: requests accepted and not yet ended, their pictures, and seconds to do it."""

    requests: int
    pictures: int
    backlog_s: float


@dataclass(frozen=True)
class RemainingWork:
    """What is left to do for one accepted request."""

    steps: int
    rows: int
    seconds_per_row: SecondsPerRow


def backlog_s(work: Iterable[RemainingWork]) -> float:
    """Seconds until everything in hand is done, were nothing more to come."""
    return sum(item.steps * item.rows * item.seconds_per_row for item in work)


def check_room(load: Load, pictures: int, limit: int) -> None:
    """Let a request for `pictures` pictures in, or refuse it.

    Pictures are counted rather than requests, because they are what takes memory and time. An
    empty server takes any request.

    Raises:
        ServerFullError: more than `limit` pictures would be in hand; `retry_after_s` is the time
            in which a fair share of the work in hand will be done.
    """
    if load.requests and load.pictures + pictures > limit:
        share_s = load.backlog_s / load.requests
        raise ServerFullError(
            f"the server is full: {load.pictures} pictures are in hand and the limit is {limit}; "
            f"this request asks for {pictures} more",
            retry_after_s=max(share_s, MINIMUM_RETRY_S),
        )
