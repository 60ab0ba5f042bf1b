"""BentoML with its adaptive batching: a service that batches, and one before it that takes HTTP.

    bentoml serve loadtests.peers.bentoml_server:Emoji --port 8100

That is how its documentation batches requests of several parameters. `max_latency_ms` is so long
that nothing is refused for being expected to be late; the batching window adapts itself.
"""

from typing import Any

import bentoml

from loadtests.peers.common import PATH, ImageRequest, PeerSettings, load_pipeline, make_batch

settings = PeerSettings.read()
NEVER_MS = 3_600_000
NEVER_S = NEVER_MS // 1000


@bentoml.service(workers=settings.replicas, traffic={"timeout": NEVER_S})
class Model:
    """The pipeline, and batches of requests for it."""

    def __init__(self) -> None:
        self.pipeline = load_pipeline(settings)

    @bentoml.api(batchable=True, max_batch_size=settings.max_batch_size, max_latency_ms=NEVER_MS)
    def make(self, requests: list[ImageRequest]) -> list[dict[str, Any]]:
        """Make the images of a batch."""
        return make_batch(self.pipeline, requests, settings.pad_steps)


@bentoml.service(workers=1, traffic={"timeout": NEVER_S})
class Emoji:
    """Takes HTTP and hands it on."""

    model = bentoml.depends(Model)

    @bentoml.api(route=PATH)
    async def generate(
        self,
        prompt: str,
        size: str = "64x64",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        scheduler: str = "DDIMScheduler",
        seed: int = 0,
        n: int = 1,
    ) -> dict[str, Any]:
        """Make the images of one request, in whatever batch it gets into."""
        request = ImageRequest(
            prompt=prompt,
            size=size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            seed=seed,
            n=n,
        )
        (answer,) = await self.model.to_async.make([request])
        told: dict[str, Any] = answer
        return told
