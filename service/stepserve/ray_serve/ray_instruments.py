"""Metrics through Ray: each node's agent adds up what its processes record, and keeps it."""

from __future__ import annotations

import threading
from typing import Any

from ray.util import metrics as ray_metrics

from stepserve.telemetry.catalogue import Kind, Metric
from stepserve.telemetry.exposition import EXACT_SUM
from stepserve.telemetry.instruments import Labels


class RayInstruments:
    """Records values as Ray's metrics, made on first use. Thread-safe."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def count(self, metric: Metric, amount: float, labels: Labels) -> None:
        """Add to a counter; nothing where the amount is 0."""
        if amount > 0:
            self._get(metric).inc(amount, tags=dict(labels))

    def observe(self, metric: Metric, value: float, labels: Labels) -> None:
        """Add one value to a histogram, and to the exact sum beside it."""
        self._get(metric).observe(value, tags=dict(labels))
        self.count(_exact_sum(metric), value, labels)

    def set(self, metric: Metric, value: float, labels: Labels) -> None:
        """Set a gauge."""
        self._get(metric).set(value, tags=dict(labels))

    def _get(self, metric: Metric) -> Any:
        made = self._made.get(metric.name)
        if made is None:
            with self._lock:
                made = self._made.setdefault(metric.name, _make(metric))
        return made


def _exact_sum(metric: Metric) -> Metric:
    name = f"{metric.name}{EXACT_SUM}_total"
    return Metric(name, Kind.COUNTER, f"Exact sum of {metric.name}.", metric.labels)


def _make(metric: Metric) -> Any:
    match metric.kind:
        case Kind.COUNTER:
            # Ray adds the ending to names without it.
            name = metric.name.removesuffix("_total")
            return ray_metrics.Counter(name, metric.help, metric.labels)
        case Kind.GAUGE:
            return ray_metrics.Gauge(metric.name, metric.help, metric.labels)
        case Kind.HISTOGRAM:
            buckets = list(metric.buckets)
            return ray_metrics.Histogram(metric.name, metric.help, buckets, metric.labels)
