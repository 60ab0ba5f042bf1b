from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from stepserve.doctor import examine
from stepserve.usual_bodies import usual_body

REFUSED = {"error": {"message": "the API key is wrong", "param": None}}


class RefusingHandler(BaseHTTPRequestHandler):
    """A service that is up, and refuses whatever needs a key, or needs none of it."""

    def do_GET(self) -> None:
        """Say that it is up and ready, and refuse the rest."""
        if self.path in ("/healthz", "/readyz"):
            self._response(200, json.dumps({"status": "ok", "version": "0", "results": ""}))
        else:
            self._response(401, json.dumps(REFUSED) if self.path != "/metrics" else "<h1>no</h1>")

    def do_POST(self) -> None:
        """Refuse images of a priority, and make all others."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        wrong: dict[str, object] = {"error": {"message": "priority is not open to this API key"}}
        status, told = (400, wrong) if "priority" in body else (200, {"data": [{}]})
        self._response(status, json.dumps(told))

    def _response(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("X-Request-ID", "some-id")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_is_refused_is_told_in_the_words_of_the_service(refusing: str):
    found = {finding.name: finding for finding in examine(refusing)}

    assert found["readiness"].told == "the API key is wrong (status 401, request some-id)"
    assert found["metrics"].told == f"status 401 from {refusing}/metrics"
    assert found["metrics"].advice == "give an API key: --api-key, or STEPSERVE_API_KEY"


def test_a_key_that_may_not_ask_for_a_priority_is_enough(refusing: str):
    (image,) = (finding for finding in examine(refusing) if finding.name == "image")

    assert image.well, image.told


def test_nobody_answers():
    with socket.socket() as taken:
        # Bound and not listened to: whoever connects is refused.
        taken.bind(("127.0.0.1", 0))
        (finding,) = examine(f"http://127.0.0.1:{taken.getsockname()[1]}")

    assert not finding.well
    assert finding.name == "reachability"
    assert "is the service started" in finding.advice


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ({"text-to-image": {"prompt": {"least": 1, "most": 1}}}, {"prompt": "owl"}),
        ({"class-to-image": {"class_label": {"least": 1, "most": 1}}}, {"class_label": 0}),
        ({"unconditional": {}}, {}),
        ({"upscaling": {"image": {"least": 1, "most": 1}}}, None),
        (
            {
                "inpainting": {"image": {"least": 1, "most": 1}},
                "text-to-image": {
                    "prompt": {"least": 1, "most": 1},
                    "controls": {"least": 0, "most": 4},
                },
            },
            {"prompt": "owl"},
        ),
    ],
)
def test_a_model_is_asked_for_what_it_can_do(inputs: object, body: object):
    assert usual_body({"inputs": inputs}, "owl") == body
