"""Dashboard, rules and runbooks fit one another, and Prometheus understands them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring_files import (
    DASHBOARD,
    PROMETHEUS,
    ROOT,
    dashboard_queries,
    generated_dashboard,
    names_in,
    rules,
)
from stepserve.telemetry.catalogue import METRICS, Kind

PANEL_NAMES = {"Stepserve": "stepserve"}


def exposed_names() -> set[str]:
    """Names of all series that `/metrics` may show, and of all that are recorded from them."""
    names = {rule["record"] for rule in rules("recording.yml")}
    names.add("stepserve_metrics_unreachable_nodes")
    for metric in METRICS:
        endings = ("_bucket", "_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
        names |= {metric.name + ending for ending in endings}
    return names


def promtool(*arguments: str | Path) -> None:
    command = shutil.which("promtool")
    if command is None:
        pytest.skip("Prometheus is not installed")
    ran = subprocess.run(
        [command, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_dashboard_is_what_its_source_makes():
    assert json.loads(DASHBOARD.read_text()) == generated_dashboard()


def test_dashboard_tells_its_story_in_order():
    rows = [p["title"] for p in generated_dashboard()["panels"] if p["type"] == "row"]

    assert rows == [
        "Are users served?",
        "How full are the batches?",
        "Where does time go?",
        "Is it scaling?",
    ]


def test_panels_do_not_overlap_and_are_explained():
    taken: set[tuple[Any, Any]] = set()
    for panel in generated_dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_only_series_that_exist_are_asked_for():
    queries = [query for _, query in dashboard_queries()]
    queries += [rule["expr"] for name in ("alerts", "recording") for rule in rules(f"{name}.yml")]
    asked = {name for query in queries for name in names_in(query)}

    assert len(asked) > 20
    assert asked - exposed_names() == set()


def test_every_metric_is_of_use_to_somebody():
    asked = {name for _, query in dashboard_queries() for name in names_in(query)}
    asked |= {
        n for f in ("alerts", "recording") for r in rules(f"{f}.yml") for n in names_in(r["expr"])
    }
    unused = {m.name for m in METRICS if not any(name.startswith(m.name) for name in asked)}
    # Of use beside others, in ad-hoc queries.
    assert unused <= {
        "stepserve_http_request_duration_seconds",
        "stepserve_requests_total",
        "stepserve_forward_calls_total",
        "stepserve_batch_rows",
        "stepserve_requests_in_flight",
        "stepserve_build_info",
    }


def test_queries_of_the_dashboard_can_be_parsed(tmp_path: Path):
    recorded = [
        {"record": f"panel:{number}", "expr": query}
        for number, (_, query) in enumerate(dashboard_queries())
    ]
    assert len(recorded) >= 24
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    promtool("check", "rules", file)


def test_rules_do_what_they_are_meant_to():
    promtool("check", "rules", PROMETHEUS / "recording.yml", PROMETHEUS / "alerts.yml")
    promtool("test", "rules", PROMETHEUS / "tests.yml")


@pytest.mark.parametrize("rule", rules("alerts.yml"), ids=lambda rule: rule["alert"])
def test_each_alert_is_tested_and_has_a_runbook(rule):
    page = ROOT / rule["annotations"]["runbook_url"]
    assert page.read_text().startswith(f"# {rule['alert']}\n")
    assert f"alertname: {rule['alert']}\n" in (PROMETHEUS / "tests.yml").read_text()
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}


def test_alerts_that_panels_name_exist():
    text = DASHBOARD.read_text()
    told = {
        word.strip('.",')
        for word in text.split()
        if word.startswith("Stepserve") and len(word) > 12
    }
    alerts = {rule["alert"] for rule in rules("alerts.yml")}
    assert told
    assert {word for word in told if word.isalpha()} <= alerts


def test_panels_that_pages_name_exist():
    titles = {panel["title"] for panel in generated_dashboard()["panels"]}
    pages = [ROOT / "docs" / "operations.md", *(ROOT / "docs" / "runbooks").glob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(r"(?<![*\w])\*([A-Z][^*]+)\*(?!\*)", page.read_text())
    }
    assert len(named) > 10
    assert {" ".join(name.split()) for name in named} <= titles
