"""What can go wrong while a model is loaded."""

from __future__ import annotations

from service.domain.errors import StepserveError


class ModelLoadError(StepserveError):
    """A model could not be loaded; the message says which and why."""
