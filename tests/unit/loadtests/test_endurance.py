"""What a long run must not leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtests.endurance import faults_of, growth_of, main, parse_options, slowdown_of
from loadtests.load.client import Outcome, Status
from loadtests.load.trace import HOMOGENEOUS, draw_trace
from loadtests.results.measures import Run

OPTIONS = parse_options([])


def report(**changes: Any) -> dict[str, Any]:
    run = {"counts": {"ok": 9, "cancelled": 1, "refused": 1}, "void": False, "complaints": []}
    flat = {"process": "replica 1", "mib_per_hour": 2.0}
    return {"run": run, "growth": [flat], "left_in_flight": 0, "slowdown": 1.01} | changes


def run_with(latencies_s: list[float]) -> Run:
    outcomes = [Outcome(i, Status.OK, float(i), float(i), i + s) for i, s in enumerate(latencies_s)]
    count = len(latencies_s)
    return Run(draw_trace(HOMOGENEOUS, count, 0), list(range(count)), outcomes, [2.0] * count)


def test_memory_that_grows_once_caches_have_filled_is_told_in_mib_an_hour() -> None:
    filling = [(float(second), 100.0 + 10 * second) for second in range(20)]
    flat = [(float(second), 300.0) for second in range(20, 100)]
    assert growth_of("p", filling + flat, filling=0.2).mib_per_hour == pytest.approx(0)
    assert growth_of("p", filling + flat, filling=0.1).mib_per_hour > 100
    growing = [(float(second), 300 + 0.1 * second) for second in range(100)]
    assert growth_of("p", growing, filling=0.6).mib_per_hour == pytest.approx(360)


def test_latency_that_grows_is_told_as_a_ratio() -> None:
    assert slowdown_of(run_with([1.0] * 50)) == pytest.approx(1)
    assert slowdown_of(run_with([1 + 0.02 * i for i in range(51)])) == pytest.approx(2)
    assert slowdown_of(run_with([1.0] * 25 + [5.0] + [1.0] * 25)) == pytest.approx(1, abs=0.01)


def test_a_run_that_left_nothing_behind_has_no_faults() -> None:
    assert faults_of(report(), OPTIONS) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"growth": [{"process": "replica 1", "mib_per_hour": 90.0}]}, "90 MiB an hour"),
        ({"left_in_flight": 2}, "2 requests are still in flight"),
        ({"slowdown": 1.5}, "1.50"),
        ({"run": report()["run"] | {"counts": {"failed": 1}}}, "not all were answered"),
        ({"run": report()["run"] | {"void": True}}, "void"),
    ],
)
def test_each_fault_is_told(changes: dict[str, Any], fault: str) -> None:
    (told,) = faults_of(report(**changes), OPTIONS)
    assert fault in told


def test_a_service_is_told_by_its_address_and_its_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = parse_options(["--host", "http://127.0.0.1:8000", "--pid", "7"])
    assert (told.host, told.pid) == ("http://127.0.0.1:8000", 7)
    with pytest.raises(SystemExit):
        parse_options(["--host", "http://127.0.0.1:8000"])
    assert "--host and --pid belong together" in capsys.readouterr().err


def test_a_process_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = ["--host", "http://127.0.0.1:9", "--pid", str(2**22 + 1)]
    with pytest.raises(SystemExit, match="there is no process 4194305"):
        main([*gone, "--out", str(tmp_path / "endurance.json")])
