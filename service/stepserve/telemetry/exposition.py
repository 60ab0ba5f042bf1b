"""The pages of all nodes' metrics agents, merged into one page of the whole application.

Each process of a node has series of its own there. Here they are added up, so that a page does not
grow with every restart. A label keeps nodes apart: when one leaves, its series end. A sum would
fall instead, which Prometheus would take for a restart from 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
AGENT_PREFIX = "ray_"
OURS = "ray_stepserve_"
SERVES = "ray_serve_"
# Ray's agent makes up the sums of histograms from the middles of buckets, so ours are counted too.
EXACT_SUM = "_exact_sum"
NODE_LABEL = "node"
UNREACHABLE = "stepserve_metrics_unreachable_nodes"
PROCESS_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}

Key = tuple[str, tuple[tuple[str, str], ...]]


def merge(pages: Mapping[str, str | None]) -> str:
    """One page from the pages of nodes by address; None is a node that did not respond."""
    families: dict[str, Family] = {}
    values: dict[str, dict[Key, float]] = defaultdict(dict)
    sums: dict[Key, float] = defaultdict(float)
    for node, page in pages.items():
        for family in text_string_to_metric_families(_relevant(page or "")):
            name = _public(family.name)
            if name.endswith(EXACT_SUM):
                _add_exact_sums(family, node, sums)
                continue
            families.setdefault(name, Family(name, family.documentation, family.type))
            _add(family, node, values[name])
    _correct(values, sums)
    for name, family in families.items():
        series = values[name].items()
        family.samples = [Sample(sample, dict(labels), value) for (sample, labels), value in series]
    number = sum(page is None for page in pages.values())
    unreachable = GaugeMetricFamily(UNREACHABLE, "Nodes whose metrics are missing here.", number)
    found = _Families([*(families[name] for name in sorted(families)), unreachable])
    return generate_latest(found).decode()


class _Families(list[Family], Collector):
    def collect(self) -> list[Family]:
        return self


def _relevant(page: str) -> str:
    """The lines that are ours or Ray Serve's: parsing all of them would take ten times as long."""
    kept = (line for line in page.splitlines() if _family_of(line).startswith((OURS, SERVES)))
    return "\n".join([*kept, ""])


def _family_of(line: str) -> str:
    return line.split(" ", 3)[2] if line.startswith(("# HELP ", "# TYPE ")) else line


def _public(name: str) -> str:
    """Ours without the agent's prefix; Ray Serve's are known with it."""
    return name.removeprefix(AGENT_PREFIX) if name.startswith(OURS) else name


def _add(family: Family, node: str, values: dict[Key, float]) -> None:
    for sample in family.samples:
        key = _key(sample, node)
        is_gauge = family.type == "gauge"
        values[key] = sample.value if is_gauge else values.get(key, 0.0) + sample.value


def _add_exact_sums(family: Family, node: str, sums: dict[Key, float]) -> None:
    for sample in family.samples:
        name, labels = _key(sample, node)
        sums[name.replace(f"{EXACT_SUM}_total", "_sum"), labels] += sample.value


def _key(sample: Sample, node: str) -> Key:
    labels = {k: v for k, v in sample.labels.items() if _is_kept(k)} | {NODE_LABEL: node}
    return _public(sample.name), tuple(sorted(labels.items()))


def _is_kept(label: str) -> bool:
    return label not in PROCESS_LABELS and not label.startswith("otel_scope_")


def _correct(values: dict[str, dict[Key, float]], sums: Mapping[Key, float]) -> None:
    for (name, labels), value in sums.items():
        series = values.get(name.removesuffix("_sum"), {})
        if (name, labels) in series:
            series[name, labels] = value
