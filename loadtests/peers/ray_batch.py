"""Ray Serve with `@serve.batch`, its documented way to batch requests.

    PEER_PORT=8100 PEER_PAD_STEPS=0 python -m loadtests.peers.ray_batch

`@serve.batch` knows no keys: a batch holds what came in, and is made in as many pipeline calls as
there are groups of equal parameters in it. With PEER_PAD_STEPS=1 step counts need not be equal: the
longest decides for all. The calls run on a thread, so that the replica collects the next batch
meanwhile; and HTTP ends in the replica itself, which saves the hop of the documented application.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from loadtests.peers.common import PATH, ImageRequest, PeerSettings, load_pipeline, make_batch
from loadtests.peers.ray_start import NO_LIMIT, model_options, run_until_stopped

app = FastAPI()


@serve.deployment(**NO_LIMIT)
@serve.ingress(app)
class BatchingModel:
    """The pipeline, and batches of requests for it."""

    def __init__(self, settings: PeerSettings) -> None:
        self.settings = settings
        self.pool = ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(settings.threads,)
        )
        self.pipeline = load_pipeline(settings)
        self.make.set_max_batch_size(settings.max_batch_size)
        self.make.set_batch_wait_timeout_s(settings.batch_wait_s)

    @serve.batch
    async def make(self, requests: list[ImageRequest]) -> list[dict[str, Any]]:
        """Make the images of a batch."""
        loop = asyncio.get_running_loop()
        arguments = self.pipeline, requests, self.settings.pad_steps
        return await loop.run_in_executor(self.pool, make_batch, *arguments)

    @app.post(PATH)
    async def generate(self, request: ImageRequest) -> dict[str, Any]:
        """Make the images of one request, in whatever batch it gets into."""
        answer: dict[str, Any] = await self.make(request)
        return answer


if __name__ == "__main__":
    settings = PeerSettings.read()
    options = model_options(settings) | {"num_replicas": settings.replicas}
    run_until_stopped(BatchingModel.options(**options).bind(settings), settings)
