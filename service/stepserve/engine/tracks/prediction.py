"""When the engine expects a request to end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """What was last predicted of a request, and when.

    Args:
        at_s: on the engine's clock.
        seconds: from then until its end.
        forward_s: one forward of what was in flight.
    """

    at_s: float
    seconds: float
    forward_s: float
