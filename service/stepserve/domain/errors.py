"""The error tree. Every error survives pickling, because errors cross process borders.

StepserveError
├── InvalidRequestError          the caller can mend it: names field, value and limit
│   ├── UnknownModelError
│   ├── UnknownRequestError
│   ├── RequestIdInUseError
│   └── BodyTooLargeError
├── RefusedError                 refused at the door; says when to try again
│   ├── ServerFullError
│   ├── UnmeetableDeadlineError  its deadline would pass before the request could be finished
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
    """No request of that id is known; long after its end it is forgotten."""


class RequestIdInUseError(InvalidRequestError):
    """A request of that id is still at work."""


class BodyTooLargeError(InvalidRequestError):
    """The request body is longer than the limit."""


class RefusedError(StepserveError):
    """Refused at the door: nothing was started.

    Args:
        retry_after_s: seconds after which a new try is likely to succeed.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.retry_after_s)


class ServerFullError(RefusedError):
    """As much work as the server takes on is already waiting."""


class UnmeetableDeadlineError(RefusedError):
    """The request could not be finished within the deadline that it states.

    Args:
        retry_after_s: seconds until it should be let in with that deadline; infinite if it takes
            longer even alone.
        expected_s: the least deadline that could be promised now.
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
    """The pipeline raised; the message says what."""


class ContentFilteredError(EndedError):
    """The model's own safety checker withheld every image; another seed or prompt may pass."""


class StoppedError(EndedError):
    """The server stopped before the request was finished; another one may do it."""


class CancelledError(EndedError):
    """The caller left or asked to stop."""


class ExpiredError(EndedError):
    """The deadline that the caller set passed before the request was finished."""


def forget_frames(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and of what led to it: frames hold tensors and files."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
