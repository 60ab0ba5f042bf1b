"""Where recorded values go: Ray's metrics in the service, a list in tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from stepserve.telemetry.catalogue import Metric

Labels = Mapping[str, str]


class Instruments(Protocol):
    """Takes values of metrics in. May be called from any thread."""

    def count(self, metric: Metric, amount: float, labels: Labels) -> None:
        """Add to a counter; nothing where the amount is 0."""
        ...

    def observe(self, metric: Metric, value: float, labels: Labels) -> None:
        """Add one value to a histogram."""
        ...

    def set(self, metric: Metric, value: float, labels: Labels) -> None:
        """Set a gauge. It must be set again and again, or its value is taken to be gone."""
        ...
