"""Ray Serve's documented Stable Diffusion application: a FastAPI ingress and one model replica.

    PEER_PORT=8100 python -m loadtests.peers.ray_replica

The replica makes one request at a time (`max_ongoing_requests=1`): diffusers' pipelines are not
made to be called by several at once. Pictures are encoded there, so that no raw pixels travel.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from loadtests.peers.common import PATH, ImageRequest, PeerSettings, load_pipeline, make_answers
from loadtests.peers.ray_start import INGRESS_OPTIONS, model_options, run_until_stopped

app = FastAPI()


@serve.deployment(**INGRESS_OPTIONS)
@serve.ingress(app)
class Ingress:
    """Takes HTTP and hands it on."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    @app.post(PATH)
    async def generate(self, request: ImageRequest) -> dict[str, Any]:
        """Make the pictures of one request."""
        answer: dict[str, Any] = await self.model.generate.remote(request)
        return answer


@serve.deployment(max_ongoing_requests=1)
class Model:
    """The pipeline."""

    def __init__(self, settings: PeerSettings) -> None:
        self.pipeline = load_pipeline(settings)

    def generate(self, request: ImageRequest) -> dict[str, Any]:
        """Make the pictures of one request."""
        return make_answers(self.pipeline, [request])[0]


if __name__ == "__main__":
    settings = PeerSettings.read()
    model = Model.options(**model_options(settings)).bind(settings)
    run_until_stopped(Ingress.bind(model), settings)
