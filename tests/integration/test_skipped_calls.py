"""Step caches over HTTP: the real service, and the embedded model with its own magnitudes."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.step_cache.magnitudes import read_magnitudes
from stepserve.pipelines.step_cache.schedule import skipped_calls

GENERATIONS = "/v1/images/generations"
STEPS = 50
PATIENCE_S = 30.0


def draw(client: httpx.Client, **body: Any) -> httpx.Response:
    usual = {"prompt": "red heart", "seed": 7, "num_inference_steps": STEPS}
    return client.post(GENERATIONS, json=usual | body).raise_for_status()


def calls_run(response: httpx.Response) -> int:
    """How many of the denoiser calls ran."""
    told = re.search(r'forwards;desc="(\d+) of (\d+)"', response.headers["Server-Timing"])
    assert told is not None
    assert int(told[2]) == STEPS
    return int(told[1])


def file_of(response: httpx.Response) -> bytes:
    return base64.b64decode(response.json()["data"][0]["b64_json"])


def parameters_in(file: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(file)) as image:
        return json.loads(image.info["parameters"])


def test_a_request_without_one_runs_every_call(client: httpx.Client) -> None:
    response = draw(client)

    assert calls_run(response) == STEPS
    assert response.json()["parameters"]["step_cache"] == "off"
    assert parameters_in(file_of(response))["step_cache"] == "off"


def test_an_adaptive_one_skips_calls_and_changes_the_image_a_little(client: httpx.Client) -> None:
    cached = draw(client, step_cache={})

    assert calls_run(cached) < 30
    whole = draw(client)
    shown = [Image.open(io.BytesIO(file_of(made))).convert("L") for made in (cached, whole)]
    levels = [abs(a - b) for a, b in zip(*(image.tobytes() for image in shown), strict=True)]
    assert 0 < sum(levels) / len(levels) < 8


def test_the_embedded_model_has_a_schedule_that_is_known_beforehand(client: httpx.Client) -> None:
    methods = client.get("/v1/models/emoji").json()["step_cache_methods"]
    assert methods == ["easycache", "magcache"]
    response = draw(client, step_cache={"method": "magcache", "threshold": 0.1})

    skipped = skipped_calls(read_magnitudes(EMBEDDED), STEPS, 0.1)
    assert skipped
    assert calls_run(response) == STEPS - len(skipped)


@pytest.mark.parametrize("method", ["easycache", "magcache"])
def test_what_an_image_tells_makes_it_again_at_any_load(client: httpx.Client, method: str) -> None:
    alone = draw(client, step_cache={"method": method, "threshold": 0.15})
    told = parameters_in(file_of(alone))
    again = {
        name: told[name]
        for name in ("prompt", "seed", "num_inference_steps", "scheduler", "step_cache")
    }
    others: list[dict[str, Any]] = [
        {"step_cache": "off"},
        {"step_cache": {}, "seed": 3},
        {"num_inference_steps": 30},
    ]
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(draw, client, **body) for body in others]
        made = pool.submit(draw, client, **again).result()
        for one in beside:
            one.result()

    assert file_of(made) == file_of(alone)
    assert calls_run(made) == calls_run(alone)
    assert made.json()["fingerprint"] == alone.json()["fingerprint"]


def test_skipped_calls_are_counted_by_method(client: httpx.Client) -> None:
    before = settled(client, "magcache")
    response = draw(client, step_cache={"method": "magcache"})

    wanted = before + STEPS - calls_run(response)
    deadline_s = time.monotonic() + PATIENCE_S
    while counted(client, "magcache") < wanted and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert counted(client, "magcache") == wanted


def settled(client: httpx.Client, method: str) -> float:
    """The count, once nothing is added that was skipped before."""
    known, now = -1.0, counted(client, method)
    while now != known:
        # Longer than it takes a value to get here.
        time.sleep(4)
        known, now = now, counted(client, method)
    return now


def counted(client: httpx.Client, method: str) -> float:
    """Calls that were skipped, as `/metrics` tells."""
    name = "stepserve_skipped_denoiser_calls_total"
    page = client.get("/metrics").text
    lines = re.findall(rf'^{name}{{[^}}]*method="{method}"[^}}]*}} (\S+)$', page, re.MULTILINE)
    return sum(map(float, lines))
