from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from recording import PrometheusInstruments
from stepserve.telemetry.catalogue import METRICS, Kind

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
UNBOUNDED = {"prompt", "seed", "request_id", "caller", "path"}


def test_names_are_unique_and_labels_bounded():
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 25
    assert not UNBOUNDED & {label for metric in METRICS for label in metric.labels}


def test_units_are_base_units():
    for metric in METRICS:
        assert not re.search(r"_(ms|millis|kb|mb|percent|minutes)(_|$)", metric.name), metric.name


def test_prometheus_finds_nothing_to_mend():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("Prometheus is not installed")
    instruments = PrometheusInstruments()
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        record = {
            Kind.COUNTER: instruments.count,
            Kind.GAUGE: instruments.set,
            Kind.HISTOGRAM: instruments.observe,
        }[metric.kind]
        record(metric, 1, labels)
    # The made-up clocks of prometheus_client's counters are none of ours.
    page = re.sub(r"(?m)^(# (HELP|TYPE) )?\S*_created.*\n", "", instruments.page())
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    assert checked.stdout + checked.stderr == ""
    assert checked.returncode == 0


def test_docs_list_each_metric():
    page = DOCS.read_text()
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        assert f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |" in page
