"""What the HTTP door needs from whoever makes the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.domain.events import Outcome
from service.domain.models import ModelCapabilities
from service.domain.requests import GenerationRequest


@dataclass(frozen=True)
class ModelStatus:
    """One served model, and whether it takes requests now; `detail` says why where it does not."""

    capabilities: ModelCapabilities
    ready: bool
    detail: str = ""


class Backend(Protocol):
    """Makes pictures. Implemented over Ray Serve handles, or in one process."""

    async def models(self) -> Sequence[ModelStatus]:
        """Return every served model, also those that are still loading."""
        ...

    async def generate(self, request: GenerationRequest) -> Outcome:
        """Serve `request` to its end; cancelling the calling task gives it up.

        Raises:
            StepserveError: as an alternative to returning it inside `Failed`.
        """
        ...
