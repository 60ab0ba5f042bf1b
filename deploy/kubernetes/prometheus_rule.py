"""Writes the rules of deploy/prometheus as a PrometheusRule, to overlays/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus"
FILE = HERE / "overlays" / "gpu" / "prometheusrule.yaml"


def prometheus_rule() -> dict[str, Any]:
    """The object as it is applied."""
    files = [RULES / "recording.yml", RULES / "alerts.yml"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "stepserve", "labels": {"release": "prometheus"}},
        "spec": {
            "groups": [g for file in files for g in yaml.safe_load(file.read_text())["groups"]]
        },
    }


if __name__ == "__main__":
    text = yaml.safe_dump(prometheus_rule(), sort_keys=False, width=110)
    FILE.write_text(f"# Made from deploy/prometheus by prometheus_rule.py.\n{text}")
