"""LitServe with its dynamic batching.

    PEER_PORT=8100 python -m loadtests.peers.litserve_server

One worker process, or as many as PEER_REPLICAS says, each of which collects up to
`max_batch_size` requests for `batch_timeout` seconds. It knows no keys: a batch is made in as many
pipeline calls as it has groups of equal parameters.
"""

from typing import Any

import litserve

from loadtests.peers.common import PATH, ImageRequest, PeerSettings, load_pipeline, make_batch


class EmojiApi(litserve.LitAPI):
    """The pipeline, and batches of requests for it."""

    def __init__(self, settings: PeerSettings) -> None:
        super().__init__(
            max_batch_size=settings.max_batch_size,
            batch_timeout=settings.batch_wait_s,
            api_path=PATH,
        )
        self.settings = settings

    def setup(self, device: str) -> None:
        """Load the model in the worker."""
        self.pipeline = load_pipeline(self.settings)

    def decode_request(self, request: ImageRequest) -> ImageRequest:
        """The body is parsed already."""
        return request

    def batch(self, inputs: list[ImageRequest]) -> list[ImageRequest]:
        """A batch is a list."""
        return inputs

    def predict(self, x: list[ImageRequest]) -> list[dict[str, Any]]:
        """Make the images of a batch."""
        return make_batch(self.pipeline, x, self.settings.pad_steps)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer for each request."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Answers are JSON already."""
        return output


if __name__ == "__main__":
    settings = PeerSettings.read()
    server = litserve.LitServer(
        EmojiApi(settings),
        accelerator="cpu",
        workers_per_device=settings.replicas,
        timeout=False,
    )
    server.run(
        host="127.0.0.1", port=settings.port, generate_client_file=False, log_level="warning"
    )
