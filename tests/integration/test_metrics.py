"""A real Prometheus scrapes the service, and answers rightly after a known load."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from monitoring_files import dashboard_queries
from running_prometheus import Prometheus, running_prometheus
from running_service import Service
from stepserve.doctor import examine

GENERATIONS = "/v1/images/generations"
STEPS = 7
PATIENCE_S = 20.0
# Nothing of the load makes these happen.
MAY_BE_EMPTY = (
    "stepserve_content_filtered_images_total",
    "stepserve_forward_retries_total",
    "stepserve_out_of_memory_total",
    "stepserve_request_retries_total",
    "stepserve_skipped_denoiser_calls_total",
)


@pytest.fixture(scope="module")
def prometheus(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with running_prometheus(folder, service.url.removeprefix("http://")) as running:
        yield running


COUNTED = {
    "images": 'sum(stepserve_images_total{model="emoji"})',
    "finished": 'sum(stepserve_requests_total{outcome="finished"})',
    "cancelled": 'sum(stepserve_requests_total{outcome="cancelled"})',
    "met": 'sum(stepserve_deadlines_total{result="met"})',
    "first steps": "sum(stepserve_time_to_first_step_seconds_count)",
    "decoded": 'sum(stepserve_rows_total{stage="decode"})',
    "ok": f'sum(stepserve_http_requests_total{{route="{GENERATIONS}", outcome="ok"}})',
    "wrong": 'sum(stepserve_http_requests_total{outcome="invalid_value", status="400"})',
    "unmeetable": 'sum(stepserve_refusals_total{reason="deadline_unmeetable"})',
    "refused": 'sum(stepserve_refusals_total{model="emoji", reason="server_full"})',
    "latencies": f'sum(stepserve_http_request_duration_seconds_count{{route="{GENERATIONS}"}})',
}
EXPECTED = {
    "images": 6,
    "finished": 3,
    "cancelled": 3,
    "met": 1,
    "first steps": 3,
    "decoded": 6,
    "ok": 3,
    "wrong": 1,
    "unmeetable": 1,
    "refused": 1,
    "latencies": 9,
}


def counts(prometheus: Prometheus) -> dict[str, float]:
    return {name: prometheus.value(query) for name, query in COUNTED.items()}


def settled(prometheus: Prometheus) -> dict[str, float]:
    """The counts, once what other tests did has arrived."""
    prometheus.wait_for('sum(up{job="stepserve"})', 1)
    prometheus.wait_for("sum(stepserve_requests_in_flight)", 0)
    seen = counts(prometheus)
    while True:
        # Longer than it takes a value to get here: four ways, of a second each.
        time.sleep(5)
        if (again := counts(prometheus)) == seen:
            return seen
        seen = again


def draw(client: httpx.Client, request_id: str = "", **body: object) -> httpx.Response:
    headers = {"X-Request-ID": request_id} if request_id else {}
    wanted = {"prompt": "a secret wish", "num_inference_steps": STEPS} | body
    return client.post(GENERATIONS, json=wanted, headers=headers)


def known_load(client: httpx.Client) -> None:
    """Three requests for two images, one wrong, three cancelled, two refused."""
    assert draw(client, "metrics-1", n=2, deadline_s=100).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        responses = list(pool.map(lambda i: draw(client, f"metrics-{i}", n=2), (2, 3)))
    assert [response.status_code for response in responses] == [200, 200]
    assert draw(client, num_inference_steps=1000, deadline_s=0.2).status_code == 429
    assert draw(client, n=99).status_code == 400
    fill_and_cancel(client)


def fill_and_cancel(client: httpx.Client) -> None:
    names = [f"metrics-long-{i}" for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        making = [pool.submit(draw, client, name, n=8, num_inference_steps=1000) for name in names]
        for name in names:
            while client.get(f"/v1/requests/{name}").status_code == 404:
                time.sleep(0.05)
        assert draw(client).status_code == 429
        for name in names:
            client.delete(f"/v1/requests/{name}").raise_for_status()
        assert {future.result().status_code for future in making} == {499}


@pytest.fixture(scope="module")
def loaded(prometheus: Prometheus, service: Service) -> dict[str, float]:
    """What the load added to each count."""
    before = settled(prometheus)
    steps = prometheus.value("sum(stepserve_denoising_steps_total)")
    with httpx.Client(base_url=service.url, timeout=120, trust_env=False) as client:
        known_load(client)
    for name, value in EXPECTED.items():
        prometheus.wait_for(COUNTED[name], before[name] + value)
    after = counts(prometheus)
    added = {name: after[name] - before[name] for name in COUNTED}
    steps = prometheus.value("sum(stepserve_denoising_steps_total)") - steps
    return added | {"steps": steps}


def test_what_was_asked_for_is_what_is_counted(loaded: dict[str, float]):
    assert {name: loaded[name] for name in EXPECTED} == EXPECTED
    # Those that were cancelled did some as well.
    assert loaded["steps"] >= 3 * STEPS


def test_sums_agree_with_one_another(loaded: dict[str, float], prometheus: Prometheus):
    rows = "sum(stepserve_rows_total)"
    assert prometheus.value(f"{rows} - sum(stepserve_batch_rows_sum)") == 0
    forwards = "sum(stepserve_forwards_total)"
    assert prometheus.value(f"{forwards} - sum(stepserve_batch_rows_count)") == 0
    busy, inside = (
        prometheus.value(f"sum(stepserve_{name}_seconds_total)")
        for name in ("engine_busy", "forward")
    )
    assert busy >= inside > 0
    assert prometheus.value("count(stepserve_row_limit)") == 1
    assert prometheus.value("sum(stepserve_images_limit)") == 24
    assert prometheus.value('sum(stepserve_device_memory_bytes{kind="resident"})') > 2e8
    assert prometheus.value("max(stepserve_model_load_seconds)") > 0.5
    assert prometheus.value("sum(stepserve_replica_starts_total)") == 1
    assert prometheus.value("sum(stepserve_metrics_unreachable_nodes)") == 0


@pytest.mark.parametrize(("title", "query"), list(dashboard_queries()))
def test_each_panel_has_an_answer(
    title: str, query: str, loaded: dict[str, float], prometheus: Prometheus
):
    # A rate takes two scrapes of a series that has only just begun.
    deadline_s = time.monotonic() + PATIENCE_S
    while not (response := prometheus.query(query)) and time.monotonic() < deadline_s:
        if any(name in query for name in MAY_BE_EMPTY):
            return
        time.sleep(0.5)
    assert response


def test_rules_are_evaluated(loaded: dict[str, float], prometheus: Prometheus):
    response = prometheus.client.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in response for rule in group["rules"]]

    assert len(rules) >= 18
    assert {rule["health"] for rule in rules} == {"ok"}, rules


def test_each_request_has_one_line_without_its_prompt(loaded: dict[str, float], service: Service):
    lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "metrics-2"]

    assert "secret wish" not in service.log
    assert (line["status"], line["outcome"], line["model"]) == (200, "ok", "emoji")
    assert line["total_s"] >= line["denoise_s"] > 0
    assert line["duration_s"] >= line["total_s"]
    assert not [line for line in lines if line.get("route") in ("/healthz", "/readyz", "/metrics")]


def test_the_doctor_finds_a_service_that_is_well(service: Service):
    findings = {finding.name: finding for finding in examine(service.url)}

    assert [finding for finding in findings.values() if not finding.well] == []
    names = "reachability version clock readiness results metrics memory image"
    assert list(findings) == names.split()
    assert "emoji on" in findings["readiness"].told
