"""What users of LiteLLM do with images. Prints what came of it as JSON."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from typing import Any

import litellm

CALL = {"api_base": os.environ["URL"], "api_key": "unused", "timeout": 60, "max_retries": 0}
IMAGE = base64.b64decode(os.environ["IMAGE"])


def drawn(response: Any) -> list[str]:
    return [image.b64_json for image in response.data]


def file(name: str) -> io.BytesIO:
    opened = io.BytesIO(IMAGE)
    opened.name = name
    return opened


def main() -> dict[str, object]:
    wanted = {"size": "64x64", "quality": "high", "user": "someone", "n": 2}
    whole = litellm.image_generation(prompt="cat", model="openai/gpt-image-1", **wanted, **CALL)
    links = litellm.image_generation(prompt="cat", model="openai/dall-e-3", **CALL)
    later = asyncio.run(litellm.aimage_generation(prompt="cat", model="openai/gpt-image-1", **CALL))
    edited = litellm.image_edit(
        file("a.png"), "blue", model="openai/gpt-image-1", mask=file("m.png"), **CALL
    )
    told: dict[str, object] = {
        "generated": len(drawn(whole)),
        "links": ["/v1/results/" in image.url for image in links.data],
        "later": len(drawn(later)),
        "edited": len(drawn(edited)),
    }
    try:
        litellm.image_generation(prompt="cat", model="openai/gpt-image-1", n=99, **CALL)
    except litellm.BadRequestError as error:
        told["refused"] = "n must be 1 to 8, got 99" in str(error)
    return told


print(json.dumps(main()))
