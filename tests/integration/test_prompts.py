"""Several prompts in one call, through real Ray Serve and the real engine."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from PIL import Image

GENERATIONS = "/v1/images/generations"
TOO_LONG = "heart " * 60


def draw(client: httpx.Client, name: str, **body: Any) -> httpx.Response:
    return client.post(GENERATIONS, json=body, headers={"X-Request-ID": name})


def image(entry: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def test_prompts_share_forwards_and_each_makes_what_it_makes_alone(client: httpx.Client) -> None:
    prompts = ["red heart", TOO_LONG, "cat face", "rocket"]
    response = draw(client, "several", prompts=prompts, seed=7, num_inference_steps=10)
    data = response.json()["data"]
    told = client.get("/v1/requests/several").json()
    events = client.get("/v1/requests/several/events").text

    assert response.status_code == 200, response.text
    assert (data[1]["error"]["status"], data[1]["error"]["param"]) == (400, "prompt")
    for index in (0, 2, 3):
        alone = draw(client, "alone", **data[index]["parameters"]).json()["data"][0]
        assert alone["seed"] == data[index]["seed"] == 7 + index
        assert image(alone).tobytes() == image(data[index]).tobytes()
        embedded = json.loads(image(data[index]).info["parameters"])
        assert (embedded["prompt"], embedded["seed"]) == (prompts[index], 7 + index)
        assert data[index]["timings"]["batch_share"] < 0.7
    assert told["state"] == "finished"
    states = [prompt["state"] for prompt in told["prompts"]]
    assert states == ["finished", "failed", "finished", "finished"]
    assert events.count("event: finished\n") == 3
    assert events.count("event: step\n") == 30


def test_a_call_is_refused_prompt_by_prompt_and_cancelled_as_one(client: httpx.Client) -> None:
    """The service takes 24 images at once."""
    with ThreadPoolExecutor() as pool:
        body = {"prompts": ["house"] * 40, "num_inference_steps": 1000}
        drawing = pool.submit(draw, client, "too-many", **body)
        while len(client.get("/v1/requests/too-many").json().get("prompts", ())) < 40:
            time.sleep(0.05)
        cancelled = client.delete("/v1/requests/too-many")
        response = drawing.result(timeout=60)

    assert cancelled.status_code == 200
    # Nobody got an image; those that found the server full may be asked for again.
    assert response.status_code == 429, response.text
    ended = client.get("/v1/requests/too-many").json()["prompts"]
    codes = [prompt["error"]["code"] for prompt in ended]
    assert codes.count("server_full") == 16
    assert codes.count("request_cancelled") == 24
