"""The running batch of one engine at one moment, for those who want to watch it."""

from __future__ import annotations

from dataclasses import dataclass

from stepserve.domain.states import RequestState


@dataclass(frozen=True)
class RequestInBatch:
    """A request that an engine has accepted and not yet answered."""

    id: str
    owner: str
    state: RequestState
    step: int
    steps: int
    rows: int


@dataclass(frozen=True)
class SharedForward:
    """One forward of a module: which requests had how many of its rows, by id and owner.

    Forwards of an engine are numbered from 1. `padded_rows` were run besides, for nobody.
    """

    number: int
    module: str
    requests: tuple[tuple[str, str, int], ...]
    padded_rows: int
    seconds: float

    @property
    def rows(self) -> int:
        """Rows of requests, without padding."""
        return sum(rows for _, _, rows in self.requests)


@dataclass(frozen=True)
class BatchView:
    """What one engine has in hand, and its latest forwards, oldest first.

    `row_limit` is the most rows of one shared denoiser forward.
    """

    row_limit: int
    requests: tuple[RequestInBatch, ...]
    forwards: tuple[SharedForward, ...]
