"""The error tree. Every error survives pickling, because errors cross process borders.

StepserveError
├── InvalidRequestError          the caller can correct it: names field, value and limit
│   ├── UnknownModelError
│   ├── UnknownRequestError
│   ├── RequestIdInUseError
│   └── BodyTooLargeError
├── RefusedError                 refused before any work; says when to retry
│   ├── ServerFullError
│   ├── UnmeetableDeadlineError  the request could not be finished within its deadline
│   └── NotReadyError            loading or draining
└── EndedError                   accepted, then ended without an image
    ├── GenerationFailedError
    ├── ContentFilteredError     the model's own safety checker withheld every image
    ├── StoppedError             the server stopped first
    ├── CancelledError
    └── ExpiredError             its deadline passed
"""

from __future__ import annotations

from typing import Any


class StepserveError(Exception):
    """Root of everything Stepserve raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(StepserveError):
    """The request cannot be served as it is.

    Args:
        field: name of the request field at fault, or None for the request as a whole.
        message: names the field, the value given and the limit.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.field)


class UnknownModelError(InvalidRequestError):
    """No model of that name is served."""


class UnknownRequestError(InvalidRequestError):
    """No request of that id is known; ended ones are forgotten after a while."""


class RequestIdInUseError(InvalidRequestError):
    """A request of that id is still in flight."""


class BodyTooLargeError(InvalidRequestError):
    """The request body is longer than the limit."""


class RefusedError(StepserveError):
    """Refused before any work was done.

    Args:
        retry_after_s: seconds after which a retry is likely to succeed.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.retry_after_s)


class ServerFullError(RefusedError):
    """The limit of pending images is reached."""


class UnmeetableDeadlineError(RefusedError):
    """The request could not be finished within the deadline that it states.

    Args:
        retry_after_s: seconds until it could be accepted with that deadline; infinite if it takes
            longer even on an idle replica.
        expected_s: the shortest deadline that would be accepted now.
    """

    field = "deadline_s"

    def __init__(self, message: str, retry_after_s: float, expected_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.expected_s = expected_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.retry_after_s, self.expected_s)


class NotReadyError(RefusedError):
    """The model is loading, or the server is draining before it stops."""


class EndedError(StepserveError):
    """The request was accepted but ended without an image."""


class GenerationFailedError(EndedError):
    """The pipeline raised; the message names the exception."""


class ContentFilteredError(EndedError):
    """The model's own safety checker withheld every image; another seed or prompt may pass."""


class StoppedError(EndedError):
    """The server stopped before the request was finished; another server may finish it."""


class CancelledError(EndedError):
    """The caller disconnected or cancelled the request."""


class ExpiredError(EndedError):
    """The request was not finished within its deadline."""


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and of what led to it: frames hold tensors and files."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
