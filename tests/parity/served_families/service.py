"""A family behind the HTTP API, from its folder on: the real app over the real replica's parts.

Only Ray is left out: what the ingress submits goes to the request tracker of a replica in the same
process.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from families.family import Family
from few_vectors import few_vectors
from PIL import Image
from stepserve.api.app import create_app
from stepserve.api.auth.access import Access
from stepserve.api.auth.keys import KeyRing
from stepserve.api.auth.usage import LocalUsage
from stepserve.api.results.store import ResultStore
from stepserve.composition import load_runner
from stepserve.config import Settings
from stepserve.domain.events import Accepted, Event
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.progress import Progress
from stepserve.domain.reports import BatchView
from stepserve.domain.request_log import NumberedEvent
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.pipelines.facts.signature import accepted_arguments
from stepserve.pipelines.loading import folders
from stepserve.pipelines.requests import call
from stepserve.pipelines.requests.input_decoding import DECODERS
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.ray_serve.replica.request_tracker import RequestTracker

from .calls import HttpCall

MODEL = "m"
MAX_ROWS = 8
OURS = "families."
# What tiny models need to be told, as their authors' defaults are for large ones.
FOR_TINY = (
    "clean_caption",
    "complex_human_instruction",
    "max_area",
    "max_sequence_length",
    "prior_num_inference_steps",
    "text_encoder_out_layers",
    "use_resolution_binning",
)


@dataclass(frozen=True)
class ServedFamily:
    """One family, served.

    Args:
        family: which one.
        reach: how it is reached.
        plain: its pipeline, which nothing but the comparison calls.
        besides: what the tiny model is told in every call.
        settings: of the service.
        runner: serves it.
    """

    family: Family
    reach: HttpCall
    plain: Any
    besides: dict[str, Any]
    settings: Settings
    runner: PipelineRunner


@contextmanager
def serve(family: Family, reach: HttpCall, folder: Path) -> Iterator[ServedFamily]:
    """Save a family's folder, and load it as `stepserve serve` does."""
    pipeline = family.build()
    # Stand-ins for what torchvision would be needed for, or for trained weights: in no library.
    own = {n: c for n, c in pipeline.components.items() if type(c).__module__.startswith(OURS)}
    besides = told_besides(family, pipeline)
    beside_folder = reach.save(without(own, family.build()), folder)
    say_sizes(folder, reach.side_px or side_of(family, pipeline))
    settings = Settings.model_validate(
        {
            "models": {
                MODEL: {
                    "path": str(folder),
                    "dtype": "float32",
                    "device": "cpu",
                    "engine": {"max_rows": MAX_ROWS, "threads": 1, "niceness": 0},
                    **beside_folder,
                }
            }
        }
    )
    with pytest.MonkeyPatch.context() as patch, few_vectors():
        tell(patch, besides)
        usual = folders.loading_arguments
        patch.setattr(folders, "loading_arguments", lambda *given: usual(*given) | own)
        runner = load_runner(MODEL, settings.models[MODEL])
        try:
            plain = reach.read(pipeline, folder)
            plain.set_progress_bar_config(disable=True)
            yield ServedFamily(family, reach, plain, besides, settings, runner)
        finally:
            runner.stop()


def told_besides(family: Family, pipeline: Any) -> dict[str, Any]:
    """What the tiny model is told in every call."""
    arguments = family.arguments(pipeline, family.variations(1)[0])
    return {name: arguments[name] for name in FOR_TINY if name in arguments}


def side_of(family: Family, pipeline: Any) -> int | None:
    """Of the images that the family's own requests ask for, if they say a size."""
    return family.arguments(pipeline, family.variations(1)[0]).get("height")


def save_sized(family: Family, folder: Path) -> Any:
    """Write the folder with the sizes of a tiny model, and return the pipeline."""
    pipeline = family.build()
    pipeline.save_pretrained(folder)
    say_sizes(folder, side_of(family, pipeline))
    return pipeline


def without(names: Iterable[str], pipeline: Any) -> Any:
    """The pipeline without these components."""
    pipeline.register_modules(**dict.fromkeys(names))
    return pipeline


def say_sizes(folder: Path, side_px: int | None) -> None:
    """Tiny models have other sizes than their classes' defaults."""
    if side_px:
        sizes = {"minimum": side_px, "maximum": 2 * side_px, "step": side_px, "native": side_px}
        (folder / "stepserve.json").write_text(json.dumps({"sizes": sizes}))


def tell(patch: pytest.MonkeyPatch, besides: dict[str, Any]) -> None:
    """Add to the arguments of every call of a pipeline."""

    def accepted(signature: Any, wanted: Any) -> dict[str, Any]:
        taken = {name: value for name, value in besides.items() if signature.accepts(name)}
        return accepted_arguments(signature, wanted) | taken

    patch.setattr(call, "accepted_arguments", accepted)


class LocalBackend:
    """A backend in this process; `accepted` gets the id of each request that is accepted."""

    def __init__(self, runner: PipelineRunner) -> None:
        self.runner = runner
        self.tracker = RequestTracker(runner)
        self.accepted: asyncio.Queue[str] = asyncio.Queue()

    async def wait_for(self, count: int) -> Any:
        """Return once so many requests were accepted."""
        return [await self.accepted.get() for _ in range(count)]

    async def start(self) -> None:
        pass

    async def models(self) -> Sequence[ModelStatus]:
        return (ModelStatus(self.runner.capabilities(), ready=True),)

    async def model(self, model_id: str) -> ModelStatus | None:
        return (await self.models())[0] if model_id == MODEL else None

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async with aclosing(self.tracker.submit(request)) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    self.accepted.put_nowait(request.id)
                yield event

    async def progress(self, key: RequestKey) -> Progress | None:
        return self.tracker.progress(key)

    async def prompts(self, call: RequestKey) -> Sequence[Progress]:
        return self.tracker.prompts(call)

    async def cancel(self, key: RequestKey) -> Progress | None:
        return self.tracker.cancel(key)

    async def events(
        self, key: RequestKey, number: int, wait_s: float
    ) -> Sequence[NumberedEvent] | None:
        return await self.tracker.events(key, number, wait_s)

    async def batch(self, model_id: str, owner: str) -> Sequence[BatchView]:
        return (self.runner.engine.batcher.view(owner),)


async def post_at_once(served: ServedFamily, bodies: Sequence[Any]) -> list[httpx.Response]:
    """Send all bodies at once; the engine goes on when all are accepted and decoded."""
    backend, runner = LocalBackend(served.runner), served.runner
    access = Access(KeyRing(()), LocalUsage(lambda: 0.0))
    store = ResultStore("memory://served", 60, b"secret")
    app = create_app(backend, served.settings, store, access)
    transport = httpx.ASGITransport(app=app)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client,
        held(runner) as go_on,
    ):
        posts = [asyncio.create_task(client.post(served.reach.url, json=body)) for body in bodies]
        accepted = asyncio.create_task(backend.wait_for(len(bodies)))
        # One that is refused is never accepted.
        await asyncio.wait([accepted, *posts], return_when=asyncio.FIRST_COMPLETED)
        accepted.cancel()
        await asyncio.to_thread(wait_for_decoders, runner)
        go_on.set()
        return await asyncio.gather(*posts)


@asynccontextmanager
async def held(runner: PipelineRunner) -> AsyncIterator[threading.Event]:
    """Keep the engine's thread until the event is set."""
    go_on = threading.Event()
    holding = asyncio.create_task(asyncio.to_thread(runner.engine.call, go_on.wait))
    try:
        yield go_on
    finally:
        go_on.set()
        await holding


def wait_for_decoders(runner: PipelineRunner) -> None:
    """Return when the images of all that was submitted are decoded."""
    meeting = threading.Barrier(DECODERS)
    threads = runner._decoder._threads
    for waiting in [threads.submit(meeting.wait) for _ in range(DECODERS)]:
        waiting.result()


def images_of(response: httpx.Response) -> list[Image.Image]:
    """The images of a response."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    return [Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))) for image in data]
