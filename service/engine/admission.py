"""Whether to take on more work. Pure: everything it looks at is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.errors import ServerFullError

MINIMUM_RETRY_S = 1.0


@dataclass(frozen=True)
class Ending:
    """A request in hand will be finished in `seconds`, and with it so many pictures."""

    seconds: float
    pictures: int


@dataclass(frozen=True)
class Load:
    """Work in hand: requests accepted and not yet ended, their pictures, and seconds to do it."""

    requests: int
    pictures: int
    backlog_s: float


def load_of(endings: Sequence[Ending]) -> Load:
    """Everything in hand, summed up."""
    return Load(
        requests=len(endings),
        pictures=sum(ending.pictures for ending in endings),
        backlog_s=max((ending.seconds for ending in endings), default=0.0),
    )


def check_room(endings: Sequence[Ending], pictures: int, limit: int) -> None:
    """Let a request for `pictures` pictures in, or refuse it.

    Pictures are counted rather than requests, because they are what takes memory and time. An
    empty server takes any request.

    Args:
        endings: of everything in hand.

    Raises:
        ServerFullError: more than `limit` pictures would be in hand; `retry_after_s` is the time
            until so many of them should be finished that this request would be let in.
    """
    in_hand = sum(ending.pictures for ending in endings)
    if endings and in_hand + pictures > limit:
        raise ServerFullError(
            f"the server is full: {in_hand} pictures are in hand and the limit is {limit}; "
            f"this request asks for {pictures} more",
            retry_after_s=max(_room_s(endings, in_hand + pictures - limit), MINIMUM_RETRY_S),
        )


def _room_s(endings: Sequence[Ending], too_many: int) -> float:
    """When `too_many` pictures are finished, or all, if that is not enough."""
    seconds = 0.0
    for ending in sorted(endings, key=lambda item: item.seconds):
        seconds = ending.seconds
        too_many -= ending.pictures
        if too_many <= 0:
            break
    return seconds
