"""The page that is made of measurements, and the servers that are started for them."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from loadtests.bench import has_void, parse_options, print_table
from loadtests.load.client import Outcome, Status
from loadtests.load.contenders import Contender, contenders, running
from loadtests.load.trace import MIXED, draw_trace
from loadtests.race import REFERENCE, finalists, in_order
from loadtests.race import parse_options as parse_race_options
from loadtests.report import goals, main
from loadtests.results.measures import Run, make_targets, summarize, summarize_overload

TARGETS = make_targets(2.0)
FACTS = {
    "date": "2026-01-01",
    "processor": "a processor",
    "extensions": [],
    "cores": 2,
    "memory_gib": 8,
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2"},
    "commit": "abc",
}


def run_of(latency_s: float, count: int = 60) -> Run:
    outcomes = [Outcome(i, Status.OK, float(i), float(i), i + latency_s) for i in range(count)]
    return Run(draw_trace(MIXED, count, 0), list(range(count)), outcomes, [1.0] * count)


def turn(rate_per_s: float, latency_s: float, knee_per_s: float) -> dict[str, Any]:
    summary = summarize(run_of(latency_s), TARGETS)
    offline = {"throughput_per_s": rate_per_s}
    knees = {target.name: knee_per_s for target in TARGETS}
    knee = {"knees_per_s": knees, "runs": [{"rate_per_s": 1.0, **summary}]}
    return {"offline": offline, "homogeneous": offline, "short_jobs": summary, "knee": knee}


def race() -> dict[str, Any]:
    def server(role: str, *turns: dict[str, Any]) -> dict[str, Any]:
        return {"tuned": "as it is", "role": role, "turns": list(turns)}

    overload = summarize_overload(run_of(1.0), TARGETS[0], 10, 30, 1.0)
    return {
        "kind": "race",
        "facts": FACTS,
        "command": "python -m loadtests.race",
        "openmp": "short-spin",
        "reference": REFERENCE,
        "requests": 60,
        "short_jobs_load": 0.8,
        "targets": [{"name": target.name} for target in TARGETS],
        "servers": {
            REFERENCE: server("one-at-a-time", turn(1, 6, 1), turn(3, 6, 1), turn(2, 6, 1)),
            "ray-batch": server("batching", turn(4, 10, 0.5)),
            "stepserve": server("ours", turn(8, 1, 4)) | {"overload": overload},
            "broken": server("batching") | {"trouble": "OSError: no such program"},
        },
    }


def test_goals_are_ratios_to_the_best_of_each_kind() -> None:
    measured = {goal.what: goal for goal in goals(race())}
    name = TARGETS[0].name
    assert measured[f"goodput at {name}: over one at a time"].measured == 4
    assert measured[f"goodput at {name}: over the best batching"].measured == 8
    assert measured["saturated throughput: over one at a time"].measured == 4
    assert measured["saturated throughput: over the best batching"].measured == 2
    assert measured["homogeneous throughput: over the best of all"].measured == 2
    assert measured["4-step mean latency: one at a time over ours"].verdict == "met"
    assert measured["4-step mean latency: best batching over ours"].measured == pytest.approx(10)
    assert measured["50-step p99: ours over one at a time"].verdict == "met"
    assert measured["refusals, p99, ms"].verdict == "not measured"


def test_a_goal_that_was_missed_says_so() -> None:
    report = race()
    report["servers"]["stepserve"]["turns"] = [turn(4, 9, 1)]
    verdicts = [goal.verdict for goal in goals(report)]
    assert verdicts.count("**missed**") >= 6


def test_a_page_is_written_with_its_plots(tmp_path: Path) -> None:
    (tmp_path / "race.json").write_text(json.dumps(race()))
    assert main([str(tmp_path / "race.json"), "--out", str(tmp_path / "benchmarks.md")]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| `stepserve` | 8.00 | 8.00 | 4.00 |" in page
    assert "python -m loadtests.race" in page
    assert "`broken` could not be measured: OSError: no such program" in page
    for name in ("throughput", "goodput", "attainment"):
        assert f"(images/race-{name}.svg)" in page
        assert "<svg" in (tmp_path / "images" / f"race-{name}.svg").read_text()


def test_void_runs_are_not_passed_over(tmp_path: Path) -> None:
    report = race()
    report["servers"]["stepserve"]["turns"][0]["short_jobs"]["void"] = True
    (tmp_path / "race.json").write_text(json.dumps(report))
    main([str(tmp_path / "race.json"), "--out", str(tmp_path / "benchmarks.md")])
    assert "1 of 10 runs were void" in (tmp_path / "benchmarks.md").read_text()


def test_a_bench_is_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarize(run_of(1.0), TARGETS)
    report = {
        "kind": "bench",
        "facts": FACTS,
        "command": "python -m loadtests.bench",
        "targets": [{"name": target.name} for target in TARGETS],
        "sweep": [{"factor": factor, **summary} for factor in (0.5, 1.0)],
    }
    (tmp_path / "bench.json").write_text(json.dumps(report))
    main([str(tmp_path / "bench.json"), "--out", str(tmp_path / "benchmarks.md")])
    assert "| 0.5x | 1.02 |" in (tmp_path / "benchmarks.md").read_text()
    print_table(report)
    assert "0.5x" in capsys.readouterr().out
    assert not has_void(report)
    assert has_void({"sweep": [summary, summary | {"void": True}]})


def test_the_reference_goes_first_and_turns_are_reversed() -> None:
    options = parse_race_options(["--servers", "stepserve", REFERENCE, "litserve"])
    first, second = ([c.name for c in in_order(options, number)] for number in (0, 1))
    assert first == [REFERENCE, "stepserve", "litserve"]
    assert second == first[::-1]


def test_the_final_is_between_ours_the_reference_and_the_fastest_peers() -> None:
    def told(role: str, mixed: float, alike: float) -> dict[str, Any]:
        offline, homogeneous = ({"throughput_per_s": rate} for rate in (mixed, alike))
        return {"role": role, "turns": [{"offline": offline, "homogeneous": homogeneous}]}

    servers = {
        REFERENCE: told("one-at-a-time", 1.0, 1.0),
        "stepserve": told("ours", 3.0, 3.0),
        "other": told("one-at-a-time", 1.5, 1.5),
        "mixed": told("batching", 1.4, 1.5),
        "alike": told("batching", 1.3, 2.0),
        "ill": {"role": "batching", "turns": []},
    }
    assert finalists(servers) == [REFERENCE, "stepserve", "mixed", "alike"]


def test_a_race_without_its_reference_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_race_options(["--servers", "stepserve"])
    assert REFERENCE in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["server"], ["recorded"], ["nonsense"]])
def test_a_scenario_without_what_it_needs_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)


def test_servers_have_one_role_that_the_report_knows() -> None:
    roles = {contender.role for contender in contenders(2).values()}
    assert roles == {"ours", "one-at-a-time", "concurrent", "batching"}


def test_a_server_is_started_on_a_free_port_and_stopped(tmp_path: Path) -> None:
    os.mkfifo(log := tmp_path / "log")
    # Its output is read while the server writes it: when it has said so, it serves.
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    command = ("-u", "-m", "http.server", "--bind", "127.0.0.1", "{port}")
    with running(Contender("web", command, "", "ours"), log) as url, os.fdopen(reader) as output:
        assert "Serving HTTP" in output.readline()
        assert urllib.request.urlopen(url).status == 200
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)
