"""Instruments that keep what they are given, in prometheus_client's own registry."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from stepserve.telemetry.catalogue import Kind, Metric
from stepserve.telemetry.instruments import Labels


class PrometheusInstruments:
    """Real metrics of one process: they check names, labels and amounts as Prometheus does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._made: dict[str, Any] = {}

    def count(self, metric: Metric, amount: float, labels: Labels) -> None:
        if amount:
            self._get(metric, labels).inc(amount)

    def observe(self, metric: Metric, value: float, labels: Labels) -> None:
        self._get(metric, labels).observe(value)

    def set(self, metric: Metric, value: float, labels: Labels) -> None:
        self._get(metric, labels).set(value)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def page(self) -> str:
        return generate_latest(self.registry).decode()

    def _get(self, metric: Metric, labels: Labels) -> Any:
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        return self._made[metric.name].labels(**labels)

    def _make(self, metric: Metric) -> Any:
        keywords: dict[str, Any] = {"registry": self.registry}
        if metric.kind is Kind.HISTOGRAM:
            keywords["buckets"] = metric.buckets
        kinds = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: Histogram}
        return kinds[metric.kind](metric.name, metric.help, metric.labels, **keywords)
