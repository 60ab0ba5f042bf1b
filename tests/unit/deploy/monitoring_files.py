"""What the repository has for Prometheus and Grafana, as data."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "stepserve.json"
METRIC = re.compile(r"\b(?:ray_)?(stepserve[:_][a-z0-9_:]+)")
VARIABLES = {"$__rate_interval": "30s", "$model": ".+"}


def generated_dashboard() -> dict[str, Any]:
    """What dashboard.py makes."""
    spec = importlib.util.spec_from_file_location("dashboard", DASHBOARD.parent / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["dashboard"] = module
    spec.loader.exec_module(module)
    return module.dashboard()


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and query, its variables filled in."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            yield panel["title"], query


def rules(name: str) -> list[dict[str, Any]]:
    """All rules of a file."""
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(query: str) -> set[str]:
    """Names of metrics and recorded series that a query asks for."""
    return set(METRIC.findall(query))
