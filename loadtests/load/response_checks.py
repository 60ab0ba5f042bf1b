"""Whether an answer with images is what was asked for."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image, UnidentifiedImageError


def complaint_about_images(response: dict[str, Any], body: dict[str, Any]) -> str:
    """What is wrong with an answer to `body`; empty: nothing.

    Every image must be decodable to its last pixel and have the size that was asked for, and the
    seeds must be that of the request and those after it.
    """
    images = response.get("data")
    count = body.get("n", 1)
    if not isinstance(images, list) or len(images) != count:
        return f"there should be {count} images"
    seeds = [image.get("seed") for image in images]
    if "seed" in body and seeds != [body["seed"] + index for index in range(count)]:
        return f"seeds {seeds} do not begin with {body['seed']}"
    complaints = (complaint_about_image(image.get("b64_json"), body) for image in images)
    return next((complaint for complaint in complaints if complaint), "")


def complaint_about_image(b64_json: str | None, body: dict[str, Any]) -> str:
    """What is wrong with one image; empty: nothing."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(b64_json or "", validate=True))) as image:
            image.load()
    except (ValueError, OSError, UnidentifiedImageError) as error:
        return f"an image cannot be decoded: {type(error).__name__}"
    size = f"{image.width}x{image.height}"
    wanted = body.get("size", size)
    return "" if size == wanted else f"an image is {size} and should be {wanted}"


def read_events(lines: Iterator[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of each server-sent event, as soon as it is there."""
    name, data = "", ""
    for line in lines:
        text = line.decode()
        if not text and data:
            yield name, json.loads(data)
            name, data = "", ""
        elif text.startswith("event:"):
            name = text.removeprefix("event:").strip()
        elif text.startswith("data:"):
            data += text.removeprefix("data:").strip()
    if data:
        yield name, json.loads(data)
