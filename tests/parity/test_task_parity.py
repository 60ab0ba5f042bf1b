"""Text-to-image, image-to-image and inpainting in the same forwards, each as diffusers makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import greenlet
import numpy as np
import pytest
import torch
from parity_cases import (
    ForwardCounter,
    largest_byte_difference,
    serve_staggered,
    submit_for_files,
)
from PIL import Image
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.engine.calls.arguments import content_digest
from stepserve.engine.tracks.track import TrackGreenlet
from stepserve.pipelines.serving.runner import PipelineRunner
from task_cases import (
    TASKS,
    call_plain,
    differences,
    expected_calls,
    photo,
    request_for,
    requests_of_all_tasks,
)

Serve = Callable[..., tuple[PipelineRunner, ForwardCounter]]
Reference = Callable[[str], Any]
Say = Callable[[str], None]

INTERVALS = ((0.0, 0.6), (0.3, 1.0), (0.25, 0.75))
# Where kernels are not row-independent, bfloat16 rounds to three digits, over and over.
BFLOAT16_BYTE_BOUND = 64
# A float that differs in the sixth digit may still be rounded to the next byte.
FLOAT32_BYTE_BOUND = 1


class TaskWatcher:
    """Tells which tasks the rows of every denoiser forward belong to.

    Each row is known again by its content: tracks hand it to the UNet, and a part of the UNet gets
    it once the forward really runs.
    """

    def __init__(self, unet: Any) -> None:
        self.forwards: list[Counter[str]] = []
        self._task_of: dict[bytes, str] = {}
        self._handles = [
            unet.register_forward_pre_hook(self._handed_over),
            unet.conv_in.register_forward_pre_hook(self._ran),
        ]

    def _handed_over(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        current = greenlet.getcurrent()
        assert isinstance(current, TrackGreenlet)
        task = current.track.id.partition("/")[0]
        self._task_of |= {content_digest(row): task for row in args[0]}

    def _ran(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.forwards.append(Counter(self._task_of[content_digest(row)] for row in args[0]))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_three_tasks_share_forwards_and_give_the_plain_images(
    dtype: str, serve: Serve, reference: Reference, batch_invariant: bool, say: Say
) -> None:
    runner, counter = serve(dtype)
    watcher = TaskWatcher(runner.model.pipeline.unet)
    schedulers = runner.model.capabilities.schedulers
    requests = requests_of_all_tasks(schedulers if dtype == "bfloat16" else schedulers[::3])
    try:
        finished = serve_staggered(runner, requests, submit_for_files)
    finally:
        watcher.remove()
    wanted = [call_plain(reference(dtype), request) for request in requests]

    found = differences(requests, finished, wanted)
    images = sum(request.n for request in requests)
    together = sum(len(forward) == len(TASKS) for forward in watcher.forwards)
    say(
        f"{dtype}: {images - len(found)} of {images} files byte-identical, "
        f"{together} of {len(watcher.forwards)} forwards with all three tasks"
    )
    assert together >= 1
    assert runner.engine.counters.retries == 0
    assert sum(counter.rows) == sum(sum(forward.values()) for forward in watcher.forwards)
    if dtype == "float32":
        assert max(found.values(), default=0) <= FLOAT32_BYTE_BOUND, found
    elif batch_invariant:
        assert found == {}
    else:
        assert max(found.values(), default=0) <= BFLOAT16_BYTE_BOUND, found


def test_the_images_of_the_tasks_differ_and_the_kept_part_is_kept(reference: Reference) -> None:
    """Else a mixed-up row, or an image that was ignored, would go unseen."""
    requests = [
        request_for(
            task, 0, "DDIMScheduler", num_inference_steps=12, guidance_scale=4.0, strength=0.8
        )
        for task in TASKS
    ]
    text, image, inpainted = (call_plain(reference("bfloat16"), r)[0] for r in requests)
    assert largest_byte_difference(text, image) > 40
    assert largest_byte_difference(image, inpainted) > 40
    corner = (0, 0, 64, 12)
    original = photo().resize((64, 64), Image.Resampling.LANCZOS)
    kept, given = (np.asarray(p.crop(corner), dtype=np.int16) for p in (inpainted, original))
    assert np.abs(kept - given).mean() < 6


def limited_requests() -> list[GenerationRequest]:
    schedulers = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
    return [
        request_for(
            task,
            index,
            schedulers[(index + turn) % len(schedulers)],
            id=f"{task}/{index}-{turn}",
            num_inference_steps=10,
            guidance_scale=4.0,
            guidance_start=start,
            guidance_end=end,
        )
        for turn, (start, end) in enumerate(INTERVALS)
        for index, task in enumerate(TASKS)
    ]


def drop_guidance(
    request: GenerationRequest, pipeline: Any, index: int, timestep: Any, values: dict[str, Any]
) -> dict[str, Any]:
    """How diffusers documents it: a callback that turns guidance off before the next step."""
    calls = pipeline.num_timesteps
    if not pipeline.do_classifier_free_guidance or request.is_guided(index + 1, calls):
        return {}
    pipeline._guidance_scale = 0.0
    changed = {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}
    # The inpainting pipeline has doubled its mask for guidance as well.
    return changed | ({"mask": values["mask"].chunk(2)[-1]} if "mask" in values else {})


def test_guidance_that_ends_early_is_diffusers_own_callback(
    serve: Serve, reference: Reference, batch_invariant: bool, say: Say
) -> None:
    runner, _ = serve("bfloat16")
    requests = [request for request in limited_requests() if request.guidance_start == 0]
    finished = serve_staggered(runner, requests, submit_for_files, waves=1)
    wanted = []
    for request in requests:
        inputs = ["prompt_embeds", *(["mask"] if request.task is Task.INPAINTING else [])]
        wanted.append(
            call_plain(
                reference("bfloat16"),
                request,
                callback_on_step_end=partial(drop_guidance, request),
                callback_on_step_end_tensor_inputs=inputs,
            )
        )
    found = differences(requests, finished, wanted)
    say(f"ends early: {len(found)} of {len(requests)} requests differ: {found}")
    assert max(found.values(), default=0) <= (0 if batch_invariant else BFLOAT16_BYTE_BOUND)


def test_guidance_in_any_interval_is_a_unet_that_skips_the_unconditional_rows(
    serve: Serve,
    reference: Reference,
    batch_invariant: bool,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, counter = serve("bfloat16")
    requests = limited_requests()
    finished = serve_staggered(runner, requests, submit_for_files, waves=2)
    plain = reference("bfloat16")
    original, calls_made = plain.unet.forward, Counter[str]()

    def skipping(
        request: GenerationRequest, calls: int, sample: Any, timestep: Any, **kwargs: Any
    ) -> Any:
        index = calls_made[request.id]
        calls_made[request.id] += 1
        if request.is_guided(index, calls):
            return original(sample, timestep, **kwargs)
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"].chunk(2)[1]
        (noise,) = original(sample.chunk(2)[1], timestep, **kwargs)
        return (torch.cat([noise, noise]),)

    wanted, rows = [], 0
    for request in requests:
        calls = expected_calls(request)
        monkeypatch.setattr(plain.unet, "forward", partial(skipping, request, calls))
        wanted.append(call_plain(plain, request))
        assert calls_made[request.id] == calls
        guided = sum(request.is_guided(call, calls) for call in range(calls))
        rows += request.n * (calls + guided)

    found = differences(requests, finished, wanted)
    say(f"any interval: {len(found)} of {len(requests)} requests differ: {found}")
    assert sum(counter.rows) == rows
    assert max(found.values(), default=0) <= (0 if batch_invariant else BFLOAT16_BYTE_BOUND)
