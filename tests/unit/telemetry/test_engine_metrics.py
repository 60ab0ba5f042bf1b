from __future__ import annotations

import time
from dataclasses import replace

import pytest
from recording import PrometheusInstruments
from stepserve.domain.reports import EndReport, ForwardReport
from stepserve.domain.requests import RequestKey
from stepserve.domain.states import RequestState
from stepserve.domain.timings import Timings
from stepserve.telemetry.engine_metrics import EngineMetrics, Gauges, Totals

GAUGES = Gauges(
    backlog_s=1.5,
    requests=2,
    images=3,
    image_limit=64,
    row_limit=16,
    load_s=12.0,
    memory_bytes={"resident": 1000},
)
TIMINGS = Timings(
    queue_s=0.02, first_step_s=0.04, encode_s=0.01, denoise_s=0.3, decode_s=0.05, total_s=0.5
)


@pytest.fixture
def recorded() -> PrometheusInstruments:
    return PrometheusInstruments()


@pytest.fixture
def metrics(recorded: PrometheusInstruments) -> EngineMetrics:
    return EngineMetrics(recorded, "emoji", "r1")


def forward(stage: str = "denoise", expected_s: float | None = 0.03, rows: int = 4):
    requests = ((RequestKey("a"), rows - 1), (RequestKey("b"), 1))
    return ForwardReport(1, stage, "unet", requests, rows, 1, 16, 0.02, expected_s, 9.0)


def end(
    state: RequestState,
    steps_left: int = 0,
    has_deadline: bool = False,
    timings: Timings = TIMINGS,
    step_cache: str = "",
):
    return EndReport(RequestKey("a"), state, timings, 2, steps_left, has_deadline, 9.0, step_cache)


def test_forwards_are_added_up(metrics: EngineMetrics, recorded: PrometheusInstruments):
    for rows in (4, 8, 16):
        metrics.forward_ended(forward(rows=rows))
    metrics.forward_ended(forward("encode", None))
    metrics.flush(Totals(), GAUGES)

    denoise = {"model": "emoji", "stage": "denoise"}
    assert recorded.value("stepserve_forwards_total", **denoise) == 3
    assert recorded.value("stepserve_rows_total", **denoise) == 28
    assert recorded.value("stepserve_padded_rows_total", **denoise) == 3
    assert recorded.value("stepserve_denoising_steps_total", model="emoji") == 6
    assert recorded.value("stepserve_forward_seconds_total", **denoise) == pytest.approx(0.06)
    assert recorded.value("stepserve_batch_rows_bucket", le="8.0", **denoise) == 2
    occupancy = "stepserve_batch_occupancy_ratio"
    assert recorded.value(f"{occupancy}_count", model="emoji") == 3
    assert recorded.value(f"{occupancy}_sum", model="emoji") == pytest.approx(0.25 + 0.5 + 1)
    error = "stepserve_cost_model_error_ratio"
    assert recorded.value(f"{error}_sum", **denoise) == pytest.approx(1.5)
    assert recorded.value(f"{error}_count", model="emoji", stage="encode") is None


def test_what_was_flushed_is_not_counted_again(
    metrics: EngineMetrics, recorded: PrometheusInstruments
):
    metrics.forward_ended(forward())
    metrics.started(Totals(retries=1, out_of_memory=1, busy_s=0.5, images_withheld=1))
    metrics.flush(Totals(retries=2, out_of_memory=1, busy_s=1.0, images_withheld=1), GAUGES)
    metrics.flush(Totals(retries=3, out_of_memory=1, busy_s=1.5, images_withheld=4), GAUGES)

    assert recorded.value("stepserve_forwards_total", model="emoji", stage="denoise") == 1
    assert recorded.value("stepserve_forward_retries_total", model="emoji") == 2
    assert recorded.value("stepserve_out_of_memory_total", model="emoji") is None
    assert recorded.value("stepserve_engine_busy_seconds_total", model="emoji") == 1
    assert recorded.value("stepserve_content_filtered_images_total", model="emoji") == 3


def test_ends_by_outcome(metrics: EngineMetrics, recorded: PrometheusInstruments):
    metrics.request_ended(end(RequestState.FINISHED, has_deadline=True))
    metrics.request_ended(end(RequestState.CANCELLED, steps_left=30, has_deadline=True))
    metrics.request_ended(end(RequestState.EXPIRED, steps_left=5, has_deadline=True))
    metrics.request_ended(end(RequestState.FAILED, steps_left=7))
    metrics.flush(Totals(), GAUGES)

    for outcome in ("finished", "cancelled", "expired", "failed"):
        labels = {"model": "emoji", "outcome": outcome}
        assert recorded.value("stepserve_requests_total", **labels) == 1
        assert recorded.value("stepserve_request_duration_seconds_count", **labels) == 1
    assert recorded.value("stepserve_images_total", model="emoji") == 2
    assert recorded.value("stepserve_cancelled_steps_saved_total", model="emoji") == 35
    assert recorded.value("stepserve_deadlines_total", model="emoji", result="met") == 1
    assert recorded.value("stepserve_deadlines_total", model="emoji", result="missed") == 1
    assert recorded.value("stepserve_queue_wait_seconds_count", model="emoji") == 4
    first_step = recorded.value("stepserve_time_to_first_step_seconds_sum", model="emoji")
    assert first_step == pytest.approx(0.04)
    stage = {"model": "emoji", "stage": "decode"}
    assert recorded.value("stepserve_stage_duration_seconds_sum", **stage) == pytest.approx(0.05)


def test_skipped_calls_by_method(metrics: EngineMetrics, recorded: PrometheusInstruments):
    cached = replace(TIMINGS, denoiser_calls=50, denoiser_calls_run=23)
    whole = replace(TIMINGS, denoiser_calls=20, denoiser_calls_run=20)
    metrics.request_ended(end(RequestState.FINISHED, timings=cached, step_cache="easycache"))
    metrics.request_ended(end(RequestState.CANCELLED, timings=cached, step_cache="magcache"))
    metrics.request_ended(end(RequestState.FINISHED, timings=cached, step_cache="magcache"))
    metrics.request_ended(end(RequestState.FINISHED, timings=whole))
    metrics.flush(Totals(), GAUGES)

    skipped = "stepserve_skipped_denoiser_calls_total"
    assert recorded.value(skipped, model="emoji", method="easycache") == 27
    assert recorded.value(skipped, model="emoji", method="magcache") == 54
    assert recorded.value(skipped, model="emoji", method="") is None


def test_values_of_a_replica(metrics: EngineMetrics, recorded: PrometheusInstruments):
    metrics.started(Totals())
    metrics.flush(Totals(), GAUGES)

    replica = {"model": "emoji", "replica": "r1"}
    assert recorded.value("stepserve_backlog_seconds", **replica) == 1.5
    assert recorded.value("stepserve_images_pending", **replica) == 3
    assert recorded.value("stepserve_model_load_seconds", **replica) == 12
    assert recorded.value("stepserve_device_memory_bytes", kind="resident", **replica) == 1000
    assert recorded.value("stepserve_replica_starts_total", model="emoji") == 1


def test_reporting_costs_the_engine_next_to_nothing(metrics: EngineMetrics):
    started_s = time.perf_counter()
    for _ in range(10_000):
        metrics.forward_ended(forward())
    each_s = (time.perf_counter() - started_s) / 10_000
    # A step of the smallest model takes 10 ms; this is far below a thousandth of it.
    assert each_s < 50e-6
