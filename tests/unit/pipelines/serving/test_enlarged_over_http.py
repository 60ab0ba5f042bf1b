"""Images that are enlarged, through the API and a tiny model."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from api_fakes import client_for
from PIL import Image
from running_models import running
from stepserve.pipelines.requests.hires import make_in_phases

GENERATIONS = "/v1/images/generations"


async def test_hires_gives_what_two_calls_give(tiny_folder: Path) -> None:
    with running(tiny_folder) as (runner, backend):
        async with client_for(backend) as client:
            body: dict[str, Any] = {
                "model": "tiny",
                "prompt": "cat",
                "size": "48x64",
                "num_inference_steps": 4,
            }
            body["hires"] = {"scale": 2}
            told = (await client.post(GENERATIONS, json=body)).json()
        (request,) = backend.requests
        with torch.no_grad():
            (wanted,) = make_in_phases(runner.model, request)
    assert told["size"] == "96x128"
    image = Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"])))
    assert wanted is not None
    assert image.tobytes() == wanted.tobytes()
    embedded = json.loads(image.info["parameters"])
    assert request.hires is not None
    assert embedded["hires"] == asdict(request.hires)
    assert (embedded["width"], embedded["height"]) == (48, 64)
