"""What all peers share: the small HTTP shape, and diffusers called as its documentation shows.

Every peer gets what Stepserve gives its own model: bfloat16, channels-last convolutions, inference
mode, and on a CPU all cores in torch, and OpenMP threads that hardly spin while they wait.
"""

from __future__ import annotations

import base64
import copy
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from pydantic import BaseModel

PATH = "/v1/images/generations"


class ImageRequest(BaseModel):
    """The body of a request."""

    prompt: str
    size: str = "64x64"
    num_inference_steps: int = 20
    guidance_scale: float = 4.0
    scheduler: str = "DDIMScheduler"
    seed: int = 0
    n: int = 1

    @property
    def is_guided(self) -> bool:
        """Whether each image needs two rows."""
        return self.guidance_scale > 1

    @property
    def exact_key(self) -> tuple[Any, ...]:
        """Requests with equal keys can be one pipeline call that gives each what it asked for."""
        return (self.num_inference_steps, *self.padded_key)

    @property
    def padded_key(self) -> tuple[Any, ...]:
        """The same for calls in which the longest decides how many steps all of them take."""
        return (self.size, self.scheduler, self.guidance_scale)


@dataclass(frozen=True)
class PeerSettings:
    """How a peer is started. The race sets these by environment variables.

    Args:
        workers: requests that one process makes at a time, where it does not batch.
        replicas: processes that hold the model, where it batches.
    """

    port: int
    model: str
    device: str
    threads: int
    workers: int
    replicas: int
    max_batch_size: int
    batch_wait_s: float
    pad_steps: bool

    @classmethod
    def read(cls) -> PeerSettings:
        """From `PEER_` variables."""
        cores = len(os.sched_getaffinity(0))
        return cls(
            port=int(os.environ.get("PEER_PORT", "8000")),
            model=os.environ.get("PEER_MODEL", "service/stepserve/models/emoji"),
            device=os.environ.get("PEER_DEVICE", "cpu"),
            threads=int(os.environ.get("PEER_THREADS", cores)),
            workers=int(os.environ.get("PEER_WORKERS", cores)),
            replicas=int(os.environ.get("PEER_REPLICAS", "1")),
            max_batch_size=int(os.environ.get("PEER_MAX_BATCH_SIZE", "8")),
            batch_wait_s=float(os.environ.get("PEER_BATCH_WAIT_S", "0.02")),
            pad_steps=os.environ.get("PEER_PAD_STEPS", "0") == "1",
        )


def load_pipeline(settings: PeerSettings) -> Any:
    """Load the model once, the way Stepserve loads it."""
    # Each thread that computes has OpenMP threads of its own, and once there are more of them than
    # cores, waiting ones no longer spin. So whoever loads starts none, unless it computes as well.
    torch.set_num_threads(1)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        settings.model, dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
    )
    pipeline.to(settings.device)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(settings.threads)
    return pipeline


def make_answers(pipeline: Any, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
    """One pipeline call for requests of equal size, scheduler and guidance; their answers.

    A scheduler keeps the state of a call, so each call gets one of its own over the same modules.
    (`from_pipe`, which the documentation uses for that, goes through all weights at each call.)
    """
    first = requests[0]
    scheduler = getattr(diffusers, first.scheduler).from_config(pipeline.scheduler.config)
    called = copy.copy(pipeline)
    called.scheduler = scheduler
    width, height = map(int, first.size.split("x"))
    seeds = [request.seed + index for request in requests for index in range(request.n)]
    with torch.inference_mode():
        images = called(
            prompt=[request.prompt for request in requests for _ in range(request.n)],
            width=width,
            height=height,
            num_inference_steps=max(request.num_inference_steps for request in requests),
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    left = iter(zip(images, seeds, strict=True))
    return [_answer(request, [next(left) for _ in range(request.n)]) for request in requests]


def make_batch(
    pipeline: Any, requests: Sequence[ImageRequest], pad_steps: bool
) -> list[dict[str, Any]]:
    """A batch as it was collected: one pipeline call for each group that can be one."""
    keys = [request.padded_key if pad_steps else request.exact_key for request in requests]
    answers: list[dict[str, Any] | None] = [None] * len(requests)
    for key in dict.fromkeys(keys):
        members = [index for index, found in enumerate(keys) if found == key]
        made = make_answers(pipeline, [requests[index] for index in members])
        for index, answer in zip(members, made, strict=True):
            answers[index] = answer
    return [answer for answer in answers if answer is not None]


def _answer(request: ImageRequest, made: Sequence[tuple[Any, int]]) -> dict[str, Any]:
    return {
        "data": [{"b64_json": _png(image), "seed": seed} for image, seed in made],
        "seed": request.seed,
        "size": request.size,
    }


def _png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
