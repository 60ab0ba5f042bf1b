"""The life of a request: exactly one named state at a time, and one way to change it."""

from __future__ import annotations

from enum import StrEnum


class RequestState(StrEnum):
    """Where an accepted request stands."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset(
    {RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED}
)
MOVES: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset({RequestState.RUNNING}) | TERMINAL - {RequestState.FINISHED},
    RequestState.RUNNING: TERMINAL,
}


class IllegalMoveError(AssertionError):
    """A state change that the life of a request does not have: a bug, never the caller's fault."""


def is_terminal(state: RequestState) -> bool:
    """Whether the request has ended and will never change again."""
    return state in TERMINAL


def move(state: RequestState, target: RequestState) -> RequestState:
    """Return `target`, or raise IllegalMoveError if a request in `state` cannot go there."""
    if target not in MOVES.get(state, frozenset()):
        raise IllegalMoveError(f"a {state} request cannot become {target}")
    return target
