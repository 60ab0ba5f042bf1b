"""What can go wrong while a model is loaded."""

from __future__ import annotations

from typing import Any

from stepserve.domain.errors import StepserveError


class ModelLoadError(StepserveError):
    """A model could not be loaded.

    Args:
        message: which and why, for whoever runs the service: it may hold paths and library words.
        reason: why, for whoever uses it; None where anybody may read the message.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.reason)
