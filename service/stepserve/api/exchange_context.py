"""What is noted of an HTTP exchange on its way, for metrics and logs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from stepserve.domain.requests import GenerationRequest
from stepserve.domain.timings import Timings

UNMATCHED = "unmatched"
"""The route of an exchange whose URL has none."""


@dataclass
class ExchangeContext:
    """Filled in by whoever knows: the model once it is known to be served, the error's code.

    Args:
        prompts: of a call that has several; `generation` is then the first one's request.
        failures: codes of the errors of those that failed, where others did not.
        refusals: which of these were refusals.
    """

    model: str = ""
    error_code: str = ""
    is_refusal: bool = False
    generation: GenerationRequest | None = None
    timings: Timings | None = None
    prompts: tuple[str, ...] = ()
    failures: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def exchange_context_of(scope: Scope) -> ExchangeContext:
    """The notes of the exchange that `scope` belongs to."""
    notes: ExchangeContext = scope.setdefault("state", {}).setdefault("notes", ExchangeContext())
    return notes


@dataclass(frozen=True)
class Exchange:
    """One HTTP exchange that is over.

    Args:
        route: the route's template, such as `/v1/models/{id}`; never a path as it was sent.
        status: of the response; 499 where the client left before there was one.
        trace_id: of the W3C `traceparent` that came with it, or of its own span; else empty.
        caller: the name of the API key; empty without.
    """

    request_id: str
    trace_id: str
    method: str
    route: str
    status: int
    duration_s: float
    caller: str
    notes: ExchangeContext

    @property
    def asks_for_work(self) -> bool:
        """Whether it was a request for images."""
        return self.method == "POST"

    @property
    def outcome(self) -> str:
        """`ok`, or the code of the error."""
        if self.notes.error_code:
            return self.notes.error_code
        return "ok" if self.status < 400 else "error"


ExchangeListener = Callable[[Exchange], None]
