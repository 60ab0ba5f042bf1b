"""What clients get, as metrics."""

from __future__ import annotations

from dataclasses import dataclass

from stepserve.telemetry import catalogue as c
from stepserve.telemetry.instruments import Instruments


@dataclass(frozen=True)
class HttpAnswer:
    """One HTTP answer: what it was asked of, and what came of it. Reason: why it was refused."""

    route: str
    model: str
    status: int
    outcome: str
    duration_s: float
    refusal: str = ""


def record_answer(to: Instruments, answer: HttpAnswer) -> None:
    """Record one HTTP answer."""
    asked = {"route": answer.route, "model": answer.model}
    came = {"status": str(answer.status), "outcome": answer.outcome}
    to.count(c.HTTP_REQUESTS, 1, asked | came)
    to.observe(c.HTTP_SECONDS, answer.duration_s, asked)
    if answer.refusal:
        to.count(c.REFUSALS, 1, {"model": answer.model, "reason": answer.refusal})
