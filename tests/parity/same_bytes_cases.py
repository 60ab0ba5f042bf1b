"""Small requests of every kind, random loads of them, and digests of what comes back.

As a script it serves some of them one after another and prints their digests: another process.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import greenlet
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from stepserve.domain.errors import CancelledError
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.requests import AdapterUse, GenerationRequest, Priority, RequestKey
from stepserve.domain.tasks import Task
from stepserve.engine.calls.arguments import content_digest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.tracks.track import TrackGreenlet
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.preparation import DEFAULT_SHARING, SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from torch import nn

PATIENCE_S = 240.0
TASKS = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINTING)
PROMPTS = ("red heart", "rocket on a blue background", "smiling cat face", "green leaf, noto")
SIZES = ((64, 64), (64, 64), (64, 64), (48, 64), (64, 64), (96, 64), (64, 64))
STEPS = (3, 5, 4, 8, 6)
GUIDANCE = (4.0, 1.0, 7.5, 0.0, 5.0)
INTERVALS = ((0.0, 1.0), (0.0, 1.0), (0.25, 0.75), (0.0, 0.6))
STRENGTHS = (1.0, 0.7, 0.5)
IMAGES = (1, 1, 1, 2, 1, 3)
ADAPTERS = ("first", "second")
# What is in flight at a time, at most, while a load is served.
MOST_IN_FLIGHT = 14


def request_pool(schedulers: Sequence[str], count: int = 40) -> list[GenerationRequest]:
    """Requests that differ in everything; one in five uses an adapter."""
    return [_request(index, schedulers[index % len(schedulers)]) for index in range(count)]


def _request(index: int, scheduler: str) -> GenerationRequest:
    task = TASKS[(index + index // 20) % len(TASKS)]
    width, height = SIZES[index % len(SIZES)]
    start, end = INTERVALS[index % len(INTERVALS)]
    adapters = (AdapterUse(ADAPTERS[index // 5 % 2], 0.8),) if index % 5 == 4 else ()
    guidance_scale = GUIDANCE[index // 3 % len(GUIDANCE)]
    return GenerationRequest(
        id=f"pool-{index}",
        model="emoji",
        prompt=PROMPTS[index % len(PROMPTS)],
        negative_prompt=("", "blurry")[index // 2 % 2 if guidance_scale > 1 else 0],
        width=width,
        height=height,
        num_inference_steps=STEPS[index % len(STEPS)],
        guidance_scale=guidance_scale,
        guidance_start=start,
        guidance_end=end,
        seed=5000 + 10 * index,
        scheduler=scheduler,
        n=IMAGES[index % len(IMAGES)],
        task=task,
        images=() if task is Task.TEXT_TO_IMAGE else (_png(_photo()),),
        mask=_png(_mask()) if task is Task.INPAINTING else None,
        strength=None if task is Task.TEXT_TO_IMAGE else STRENGTHS[index % len(STRENGTHS)],
        adapters=adapters,
    )


def _photo() -> Image.Image:
    image = Image.new("RGB", (80, 80), (40, 90, 200))
    ImageDraw.Draw(image).ellipse((10, 14, 68, 72), fill=(230, 40, 30))
    return image


def _mask() -> Image.Image:
    image = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(image).rectangle((16, 16, 48, 48), fill=255)
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_adapters(folder: Path, model: Path) -> Path:
    """Two LoRA adapters with random weights, strong enough to be seen."""
    unet = load_model("emoji", model, "float32", "cpu").pipeline.unet
    for seed, name in enumerate(ADAPTERS):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, layer in unet.named_modules():
            if isinstance(layer, nn.Linear) and path.endswith(("to_q", "to_v")):
                a = torch.randn(4, layer.in_features, generator=generator)
                b = torch.randn(layer.out_features, 4, generator=generator)
                tensors[f"unet.{path}.lora_A.weight"] = a / layer.in_features**0.5
                tensors[f"unet.{path}.lora_B.weight"] = b / 4
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@contextmanager
def serving(
    folder: Path, dtype: str, adapters: Path | None = None, sharing: SharingOptions | None = None
) -> Iterator[PipelineRunner]:
    """An engine on a model of its own."""
    model = load_model("emoji", folder, dtype, "cpu")
    options = EngineOptions(max_pending_images=10_000)
    runner = PipelineRunner(
        model, options, AdapterOptions(folder=adapters), sharing or DEFAULT_SHARING
    )
    runner.start()
    try:
        yield runner
    finally:
        runner.stop()


def digest(finished: Finished) -> tuple[str, ...]:
    """SHA-256 of each file of an answer."""
    return tuple(hashlib.sha256(image.data).hexdigest() for image in finished.images)


def serve_alone(
    runner: PipelineRunner, requests: Sequence[GenerationRequest]
) -> dict[str, tuple[str, ...]]:
    """Digests of requests that are served one after another, by id."""
    digests = {}
    for request in requests:
        events: SimpleQueue[Event] = SimpleQueue()
        runner.submit(request, events.put)
        while not isinstance(event := events.get(timeout=PATIENCE_S), Finished):
            assert not isinstance(event, Failed), f"{request}: {event}"
        digests[request.id] = digest(event)
    return digests


class CoBatchWatch:
    """Tells which submissions share each forward of the denoiser.

    Each row is known again by its content: tracks hand it to the UNet, and a part of the UNet gets
    it once the forward really runs.
    """

    def __init__(self, unet: Any) -> None:
        self.rows: list[int] = []
        self.histories: dict[str, list[frozenset[str]]] = defaultdict(list)
        self._submissions: dict[bytes, set[str]] = defaultdict(set)
        self._handles = [
            unet.register_forward_pre_hook(self._handed_over),
            unet.conv_in.register_forward_pre_hook(self._ran),
        ]

    def _handed_over(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        current = greenlet.getcurrent()
        assert isinstance(current, TrackGreenlet)
        for row in args[0]:
            self._submissions[content_digest(row)].add(current.track.id)

    def _ran(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.rows.append(args[0].shape[0])
        met = [self._submissions[content_digest(row)] for row in args[0]]
        batch = frozenset(name for names in met for name in names)
        for name in batch:
            self.histories[name].append(batch)

    @property
    def mean_rows(self) -> float:
        return sum(self.rows) / len(self.rows)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class RandomLoad:
    """Submissions at random moments of the engine's own progress, some cancelled on the way.

    Args:
        pool: what is asked for.
        seed: of what is drawn. What meets what depends on the machine as well.
        enough: finished submissions after which no more are made.
        reproducible: share of submissions that ask for forwards of their own.
    """

    runner: PipelineRunner
    pool: Sequence[GenerationRequest]
    seed: int
    enough: int
    reproducible: float = 0.05
    finished: list[tuple[GenerationRequest, tuple[str, ...]]] = field(default_factory=list)
    cancelled: int = 0
    _made: int = 0
    _in_flight: dict[str, GenerationRequest] = field(default_factory=dict)
    _events: SimpleQueue[Event] = field(default_factory=SimpleQueue)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def serve(self) -> None:
        """Until enough are finished, and what is in flight then.

        Goes on where it was when it is called again with a higher `enough`.
        """
        chance = self._chance
        while self._in_flight or len(self.finished) < self.enough:
            wanted = self.enough - len(self.finished) - len(self._in_flight)
            burst = min(
                chance.choice((1, 1, 2, 3, 6)), MOST_IN_FLIGHT - len(self._in_flight), wanted
            )
            for _ in range(burst):
                self._submit(chance)
            if self._in_flight and chance.random() < 0.1:
                self.runner.cancel(RequestKey(chance.choice(list(self._in_flight))))
            self._hear(chance.choice((1, 2, 5, 12)))

    def _submit(self, chance: random.Random) -> None:
        drawn = chance.choice(self.pool)
        request = replace(
            drawn,
            id=f"{drawn.id}/{self._made}",
            priority=chance.choice(list(Priority)),
            reproducible=chance.random() < self.reproducible,
        )
        self._made += 1
        self._in_flight[request.id] = request
        self.runner.submit(request, self._events.put)

    def _hear(self, events: int) -> None:
        for _ in range(events):
            if not self._in_flight:
                return
            event = self._events.get(timeout=PATIENCE_S)
            if isinstance(event, Finished):
                self.finished.append((self._in_flight.pop(event.request_id), digest(event)))
            elif isinstance(event, Failed):
                assert isinstance(event.error, CancelledError), event
                self.cancelled += 1
                del self._in_flight[event.request_id]

    def wrong(self, wanted: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Submissions whose bytes are not those that are wanted, by the id in the pool."""
        return [
            f"{request.id} {request.scheduler} {request.task} {request.width}x{request.height}"
            for request, got in self.finished
            if got != wanted[request.id.partition("/")[0]]
        ]


def main() -> None:
    """Print digests of the first requests of the pool as JSON."""
    folder, adapters, dtype, count = sys.argv[1:]
    with serving(Path(folder), dtype, Path(adapters)) as runner:
        requests = request_pool(runner.capabilities().schedulers)[: int(count)]
        print(json.dumps(serve_alone(runner, requests)))


if __name__ == "__main__":
    main()
