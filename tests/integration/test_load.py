"""The load test as a user starts it, against the real service."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from chaos import wait
from running_service import Service

RUN_TIME_S = 8
TIMEOUT_S = 120

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="locust is not installed"
)


def load_test(host: str, report: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--host", host]
    command += ["--headless", "--users", "12", "--run-time", f"{RUN_TIME_S}s"]
    command += ["--stop-timeout", "60", "--only-summary", "--html", str(report), *options]
    folder = Path(__file__).parents[2]
    return subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_users_of_every_kind_get_right_answers(service: Service, tmp_path: Path) -> None:
    report = tmp_path / "load.html"
    short = ["--most-steps", "6", "--sizes", "48x48,64x48", "--load-shape", "spike"]
    short += ["--step-cache", "easycache"]
    done = load_test(service.url, report, *short)
    assert done.returncode == 0, done.stdout
    assert "the load test PASSED" in done.stdout
    assert re.search(r"pass: [1-9]\d* right answers", done.stdout)
    assert "METRIC   time to first step" in done.stdout
    assert "locust" in report.read_text().lower()


def test_a_service_that_answers_wrongly_fails_the_test(service: Service, tmp_path: Path) -> None:
    # Sizes that the model cannot do: every request is answered with 400.
    done = load_test(service.url, tmp_path / "load.html", "--sizes", "50x50", "--run-time", "2s")
    assert done.returncode == 1, done.stdout
    assert "the load test FAILED" in done.stdout
    assert "size 50x50 is not accepted" in done.stdout


def test_nothing_is_left_in_flight_after_clients_have_left(
    service: Service, tmp_path: Path, client: httpx.Client
) -> None:
    before = cancelled_at(client)
    # Twelve of them ask for more than can be made, so that some leave on any machine.
    options = ["--run-time", "3s", "--user-rate", "4", "Impatient"]
    done = load_test(service.url, tmp_path / "load.html", *options)
    told = re.search(r"^LEFT +impatient +(\d+)", done.stdout, re.MULTILINE)
    assert told is not None, done.stdout
    # Some leave when they are about to be answered, or before they are accepted.
    wait(lambda: cancelled_at(client) - before > int(told[1]) / 2, "who left was not cancelled")
    batch = "/v1/models/emoji/batch"
    wait(lambda: client.get(batch).json()["replicas"][0]["requests"] == [], "requests are left")


def cancelled_at(client: httpx.Client) -> float:
    """Requests that were cancelled so far, as `/metrics` tells a second later."""
    lines = client.get("/metrics").text.splitlines()
    cancelled = [line for line in lines if line.startswith("stepserve_requests_total{")]
    return sum(float(line.split()[-1]) for line in cancelled if 'outcome="cancelled"' in line)


def test_the_benchmark_measures_a_rate(service: Service, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    command = [sys.executable, "-m", "loadtests.bench", "server", "--rate", "4"]
    command += ["--host", service.url, "--mix", "homogeneous", "--requests", "8"]
    command += ["--calibration-repeats", "1", "--out", str(report)]
    folder = Path(__file__).parents[2]
    subprocess.run(command, cwd=folder, check=True, timeout=TIMEOUT_S)
    told = json.loads(report.read_text())["server"]
    assert told["counts"] == {"ok": 8}, told
    assert not told["void"]
    assert told["occupancy"]["rows_per_forward"] >= 2
    assert 0 < told["batch_share"] <= 1
    assert told["first_step_s"]["p50"] < told["latency_s"]["p50"]
