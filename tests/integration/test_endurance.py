"""A moment of the endurance test: the real service, edits and clients that leave included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running_service import Service

from loadtests import endurance

SECONDS = 20
# In a moment caches still fill, and one stall makes the last requests slow: this finds what grows
# with every request, not what takes hours.
MOST_MIB_PER_HOUR, MOST_SLOWDOWN = 1500, 6


@pytest.mark.slow
def test_a_moment_of_mixed_load_leaves_nothing_behind(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert service.process is not None
    at = ["--host", service.url, "--pid", str(service.process.pid)]
    out = tmp_path / "endurance.json"
    limits = ["--max-mib-per-hour", str(MOST_MIB_PER_HOUR), "--max-slowdown", str(MOST_SLOWDOWN)]
    load = ["--seconds", str(SECONDS), "--rate", "0.7", "--cancelled", "0.3", "--filling", "0.2"]
    code = endurance.main([*at, *load, *limits, "--out", str(out)])
    told = json.loads(out.read_text())
    assert (code, told["faults"]) == (0, []), capsys.readouterr().out
    assert told["left_in_flight"] == 0
    assert told["run"]["counts"]["ok"] > 5
    assert told["run"]["counts"]["cancelled"] > 0
    assert any(
        "stepserve" in growth["process"] or "ray" in growth["process"] for growth in told["growth"]
    )
