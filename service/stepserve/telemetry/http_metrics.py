"""What clients get, as metrics."""

from __future__ import annotations

from stepserve.telemetry import catalogue as c
from stepserve.telemetry.instruments import Instruments


def record_response(
    to: Instruments,
    *,
    route: str,
    model: str,
    status: int,
    outcome: str,
    duration_s: float,
    refusal: str = "",
) -> None:
    """Record one HTTP response. `refusal` is why its request was refused before any work."""
    labels = {"route": route, "model": model}
    to.count(c.HTTP_REQUESTS, 1, labels | {"status": str(status), "outcome": outcome})
    to.observe(c.HTTP_SECONDS, duration_s, labels)
    if refusal:
        to.count(c.REFUSALS, 1, {"model": model, "reason": refusal})
