from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from stepserve.domain.errors import (
    CancelledError,
    GenerationFailedError,
    InvalidRequestError,
    NotReadyError,
    ServerFullError,
)
from stepserve.domain.events import Event, Failed, Finished, StepFinished
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.requests import RequestKey
from stepserve.domain.timings import Timings
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests.call import denoiser_calls, make_images
from stepserve.pipelines.requests.encoding import ImageEncoder
from stepserve.pipelines.requests.input_decoding import Inputs
from stepserve.pipelines.serving import listener as listener_module
from stepserve.pipelines.serving import warm_up as warm_up_module
from stepserve.pipelines.serving.listener import RequestListener
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import CpuTimes, Curve, measure_steps, warm_up
from tiny_model import MAX_TOKENS, UNTRIED, Inbox, a_request, pixels


def test_events_come_in_order_and_end_once(runner: PipelineRunner) -> None:
    inbox = Inbox()
    runner.submit(a_request(num_inference_steps=3, n=2), inbox)
    finished = inbox.wait()
    assert inbox.kinds == ["Accepted", "Started", *["StepFinished"] * 3, "Finished"]
    steps = [event for event in inbox.events if isinstance(event, StepFinished)]
    assert [(event.step, event.steps) for event in steps] == [(1, 3), (2, 3), (3, 3)]
    assert isinstance(finished, Finished)
    assert [image.seed for image in finished.images] == [3, 4]
    assert finished.timings.denoise_s > 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "a" * MAX_TOKENS}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"scheduler": "NoSuchScheduler"}, "scheduler"),
        ({"width": 63}, "size"),
        ({"n": 99}, "n"),
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 3}, "num_inference_steps"),
    ],
)
def test_what_the_model_cannot_do_is_answered_at_once(
    runner: PipelineRunner, changes: dict[str, object], field: str
) -> None:
    inbox = Inbox()
    runner.submit(a_request(**changes), inbox)
    assert inbox.kinds == ["Failed"]
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.field == field


def test_what_nobody_expected_is_answered_too(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> int:
        raise TypeError("no such parameter")

    monkeypatch.setattr(listener_module, "calls_of_phases", broken)
    inbox = Inbox()
    runner.submit(a_request(), inbox)
    failed = inbox.wait()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GenerationFailedError)
    assert "no such parameter" in caplog.text


def test_a_full_or_stopped_server_is_answered_at_once(tiny: LoadedModel) -> None:
    runner = PipelineRunner(tiny, EngineOptions(max_pending_images=1), sharing=UNTRIED)
    first, second, late = Inbox(), Inbox(), Inbox()
    runner.submit(a_request(id="1"), first)
    runner.submit(a_request(id="2"), second)
    outcome = second.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, ServerFullError)
    runner.start()
    assert isinstance(first.wait(), Finished)
    runner.stop()
    runner.submit(a_request(id="3"), late)
    outcome = late.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, NotReadyError)


def test_cancelling_answers_with_cancelled(tiny: LoadedModel) -> None:
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    inbox = Inbox()
    runner.submit(a_request(id="7", num_inference_steps=1000), inbox)
    runner.cancel(RequestKey("7"))
    runner.start()
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, CancelledError)
    runner.stop()
    assert inbox.kinds == ["Accepted", "Failed"]


def test_a_sink_that_raises_harms_nobody(
    runner: PipelineRunner, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox()

    def broken(event: Event) -> None:
        raise RuntimeError("Event loop is closed")

    with caplog.at_level(logging.ERROR):
        runner.submit(a_request(id="broken"), broken)
        runner.submit(a_request(id="fine"), inbox)
        assert isinstance(inbox.wait(), Finished)
    assert "the listener of request broken raised" in caplog.text


def test_a_image_that_cannot_be_written_is_a_failure(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(listener_module, "encode_image", full)
    inbox = Inbox()
    runner.submit(a_request(), inbox)
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert outcome.error.message == "request r failed: OSError: no space left"
    assert inbox.kinds.count("Failed") == 1


def test_an_encoder_that_is_gone_is_a_failure() -> None:
    encoder = ImageEncoder(8)
    encoder.shutdown()
    inbox, request = Inbox(), a_request()
    listener = RequestListener(request, inbox, encoder, Inputs(request))
    listener.finished([Image.new("RGB", (8, 8))], Timings())
    assert inbox.kinds == ["Failed"]


def test_numbers_that_overflow_are_a_failure_and_not_a_black_image(
    runner: PipelineRunner, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = tiny.pipeline.unet.conv_out.bias
    kept = bias.data.clone()
    bias.data.fill_(float("inf"))
    inbox = Inbox()
    try:
        runner.submit(a_request(), inbox)
        outcome = inbox.wait()
    finally:
        bias.data.copy_(kept)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, GenerationFailedError)
    assert "not finite" in outcome.error.message


def test_steps_are_shared_and_encodes_and_decodes_are_not(tiny: LoadedModel) -> None:
    """Kernels of text encoder and VAE may round differently for another row count."""
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    inboxes = [Inbox() for _ in range(2)]
    for n, inbox in enumerate(inboxes, start=1):
        runner.submit(a_request(id=str(n), n=n, seed=10 * n), inbox)
    runner.start()
    results = [inbox.wait() for inbox in inboxes]
    runner.stop()
    counters = runner.engine.counters
    # Two text encodings and a decode each, and two steps for both.
    assert counters.retries == 0
    assert counters.forwards == 2 * 2 + 2 + 2
    assert counters.calls == 10
    for n, result in enumerate(results, start=1):
        assert isinstance(result, Finished)
        with torch.no_grad():
            wanted = make_images(tiny, a_request(n=n, seed=10 * n))
        for image, reference in zip(result.images, wanted, strict=True):
            difference = [
                abs(a - b) for a, b in zip(pixels(image.data), reference.tobytes(), strict=True)
            ]
            assert max(difference) <= 1


def test_stopping_detaches(tiny: LoadedModel) -> None:
    runner = PipelineRunner(tiny, sharing=UNTRIED)
    assert "forward" not in vars(tiny.pipeline.unet)
    runner.start()
    assert "forward" in vars(tiny.pipeline.unet)
    runner.stop()
    assert "forward" not in vars(tiny.pipeline.unet)


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [("DDIMScheduler", 5), ("HeunDiscreteScheduler", 9), ("PNDMScheduler", 14)],
)
def test_work_is_estimated_by_the_schedulers_own_count(
    runner: PipelineRunner, tiny: LoadedModel, scheduler: str, calls: int
) -> None:
    request = a_request(num_inference_steps=5, scheduler=scheduler)
    assert denoiser_calls(tiny, request) == calls
    inbox = Inbox()
    runner.submit(request, inbox)
    assert isinstance(inbox.wait(), Finished)
    assert inbox.kinds.count("StepFinished") == calls


@pytest.mark.parametrize(("max_rows", "requests"), [(16, 4), (4, 2), (1, 1)])
def test_warming_up_runs_growing_row_counts(
    tiny: LoadedModel, max_rows: int, requests: int
) -> None:
    runner = PipelineRunner(tiny, EngineOptions(max_rows=max_rows), sharing=UNTRIED)
    runner.start()
    assert warm_up(runner) > 0
    runner.stop()
    # Two steps and one decode a request; prompt and negative prompt are encoded once for all, and
    # the first is shown on the way.
    assert runner.engine.counters.calls == 3 * requests + 3
    assert runner.capabilities().previews


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_model_that_takes_few_images_at_once_warms_up(tiny: LoadedModel, most: int) -> None:
    options = EngineOptions(max_rows=16, max_pending_images=most)
    runner = PipelineRunner(tiny, options, sharing=UNTRIED)
    runner.start()
    assert warm_up(runner) > 0
    runner.stop()


def test_warming_up_measures_the_row_limit_where_none_is_configured(
    tiny: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    runner = PipelineRunner(tiny, EngineOptions(), sharing=UNTRIED)
    assert runner.engine.row_limit == 64
    runner.start()
    with caplog.at_level(logging.INFO, "stepserve.pipelines.serving.warm_up"):
        warm_up(runner)
    assert runner.engine.row_limit in (2, 4, 8, 16, 32, 64)
    assert f"at most {runner.engine.row_limit} rows share a forward" in caplog.text
    inbox = Inbox()
    runner.submit(a_request(), inbox)
    assert isinstance(inbox.wait(), Finished)
    assert runner.engine.batcher.scheduler.row_limit == runner.engine.row_limit
    runner.stop()


def test_rows_are_measured_as_far_as_memory_allows(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = tiny.pipeline.unet.forward

    def scarce(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[0] > 9:
            raise torch.OutOfMemoryError("simulated")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(tiny.pipeline.unet, "forward", scarce)
    runner = PipelineRunner(tiny, EngineOptions(), sharing=UNTRIED)
    runner.start()
    curve = measure_steps(runner)
    runner.stop()
    assert list(curve.seconds) == [2, 4, 8][: len(curve.seconds)]
    assert curve.row_limit <= 8
    assert all(seconds > 0 for seconds in curve.seconds.values())


@pytest.mark.parametrize(
    ("curve", "limit"),
    [
        (Curve({2: 1.0, 4: 1.2}), 4),
        (Curve({2: 1.0, 4: 1.2}, cut_short=True), 32),
        (Curve({2: 1.0, 4: 2.0}, cut_short=True), 2),
        (Curve({32: 1.0, 64: 1.2}, cut_short=True), 64),
        (Curve({2: 1.0, 4: 2.0, 8: 4.0}, disturbed=True), 32),
        (Curve({32: 1.0, 64: 1.2}, disturbed=True), 64),
    ],
)
def test_a_curve_limits_only_where_it_was_seen_to_stop_growing(curve: Curve, limit: int) -> None:
    assert curve.row_limit == limit


def test_what_other_processes_take_of_the_machine_is_counted_apart() -> None:
    before = CpuTimes(taken_s=10.0, busy_s=100.0, own_s=50.0)
    assert before.others_share(CpuTimes(12.0, 104.0, 53.0), cores=2) == pytest.approx(0.25)
    assert before.others_share(CpuTimes(12.0, 103.0, 53.0), cores=2) == 0.0


def test_a_busy_neighbour_is_seen() -> None:
    busy = "import time; end = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    before = CpuTimes.now()
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert before.others_share(CpuTimes.now(), os.cpu_count() or 1) > 0.3 / (os.cpu_count() or 1)


def test_measuring_stops_when_its_time_is_over(tiny: LoadedModel) -> None:
    runner = PipelineRunner(tiny, EngineOptions(), sharing=UNTRIED)
    runner.start()
    curve = measure_steps(runner, most_s=0.0)
    runner.stop()
    assert list(curve.seconds) == [2]
    assert curve.cut_short


def test_warming_up_a_model_that_makes_no_image_says_why(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(listener_module, "make_in_phases", broken)
    with pytest.raises(GenerationFailedError, match="no kernel image is available"):
        warm_up(runner)


def test_the_model_tells_what_a_usual_request_costs(runner: PipelineRunner) -> None:
    inbox = Inbox()
    limits = runner.capabilities()
    runner.submit(
        a_request(
            num_inference_steps=limits.default_num_inference_steps,
            guidance_scale=limits.default_guidance_scale,
            scheduler=limits.default_scheduler,
        ),
        inbox,
    )
    finished = inbox.wait()
    expected_s = runner.capabilities().expected_s

    assert isinstance(finished, Finished)
    assert expected_s is not None
    assert 0.2 < expected_s / finished.timings.total_s < 5


def test_a_moment_of_other_load_does_not_decide_the_row_limit(
    runner: PipelineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_s = {2: [0.02], 4: [0.30, 0.03], 8: [0.04], 16: [0.9, 0.9, 0.9]}

    def measure(runner: PipelineRunner, request: Any) -> float:
        return told_s[CLASSIC.rows_of(request)].pop(0)

    monkeypatch.setattr(warm_up_module, "_measure", measure)
    curve = measure_steps(runner)

    assert curve.seconds == {2: 0.02, 4: 0.03, 8: 0.04, 16: 0.9}
    assert curve.row_limit == 8
    assert told_s[16] == []
