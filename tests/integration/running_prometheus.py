"""A real Prometheus server that scrapes a service."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from running_service import free_port

RULES = Path(__file__).parents[2] / "deploy" / "prometheus"
START_TIMEOUT_S = 60


@dataclass(frozen=True)
class Prometheus:
    """Answers PromQL."""

    client: httpx.Client

    def query(self, promql: str) -> list[dict]:
        """The series of an instant query."""
        response = self.client.get("/api/v1/query", params={"query": promql})
        assert response.status_code == 200, response.text
        return response.json()["data"]["result"]

    def value(self, promql: str) -> float:
        """The value of a query that is a sum: 0 where there are no series."""
        result = self.query(promql)
        assert len(result) <= 1
        return float(result[0]["value"][1]) if result else 0.0

    def wait_for(self, promql: str, value: float, timeout_s: float = 60) -> None:
        """Until a query has that value."""
        deadline_s = time.monotonic() + timeout_s
        while (seen := self.value(promql)) != value:
            assert time.monotonic() < deadline_s, f"{promql} is {seen}, not {value}"
            time.sleep(0.5)


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Scrapes `target` every second, with the rules of the repository."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed")
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES / "recording.yml"), str(RULES / "alerts.yml")],
        "scrape_configs": [
            {"job_name": "stepserve", "static_configs": [{"targets": [target]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            _wait_until_ready(client, folder)
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(client: httpx.Client, folder: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline_s, (folder / "prometheus.log").read_text()
        time.sleep(0.2)
