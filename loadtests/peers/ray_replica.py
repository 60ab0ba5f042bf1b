"""Ray Serve's documented Stable Diffusion application: a FastAPI ingress and one model replica.

    PEER_PORT=8100 python -m loadtests.peers.ray_replica

The replica makes one request at a time, as a pipeline is not made to be called by several at once;
the others wait in it, and not in the router, which asks a full replica again after 25 to 500 ms.
Images are encoded in the replica, so that no raw pixels travel.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from loadtests.peers.common import PATH, ImageRequest, PeerSettings, load_pipeline, make_answers
from loadtests.peers.ray_start import NO_LIMIT, model_options, run_until_stopped

app = FastAPI()


@serve.deployment(**NO_LIMIT)
@serve.ingress(app)
class Ingress:
    """Takes HTTP and hands it on."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    @app.post(PATH)
    async def generate(self, request: ImageRequest) -> dict[str, Any]:
        """Make the images of one request."""
        answer: dict[str, Any] = await self.model.generate.remote(request)
        return answer


@serve.deployment(**NO_LIMIT)
class Model:
    """The pipeline."""

    def __init__(self, settings: PeerSettings) -> None:
        self.pool = ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(settings.threads,)
        )
        self.pipeline = load_pipeline(settings)

    async def generate(self, request: ImageRequest) -> dict[str, Any]:
        """Make the images of one request, when it is its turn."""
        loop = asyncio.get_running_loop()
        (answer,) = await loop.run_in_executor(self.pool, make_answers, self.pipeline, [request])
        return answer


if __name__ == "__main__":
    settings = PeerSettings.read()
    model = Model.options(**model_options(settings)).bind(settings)
    run_until_stopped(Ingress.bind(model), settings)
