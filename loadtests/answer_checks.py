"""Whether an answer with pictures is what was asked for."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image, UnidentifiedImageError


def complaint_about_pictures(answer: dict[str, Any], body: dict[str, Any]) -> str:
    """What is wrong with an answer to `body`; empty: nothing.

    Every picture must be decodable to its last pixel and have the size that was asked for, and the
    seeds must be that of the request and those after it.
    """
    pictures = answer.get("data")
    count = body.get("n", 1)
    if not isinstance(pictures, list) or len(pictures) != count:
        return f"there should be {count} pictures"
    seeds = [picture.get("seed") for picture in pictures]
    if "seed" in body and seeds != [body["seed"] + index for index in range(count)]:
        return f"seeds {seeds} do not begin with {body['seed']}"
    complaints = (complaint_about_picture(picture.get("b64_json"), body) for picture in pictures)
    return next((complaint for complaint in complaints if complaint), "")


def complaint_about_picture(b64_json: str | None, body: dict[str, Any]) -> str:
    """What is wrong with one picture; empty: nothing."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(b64_json or "", validate=True))) as picture:
            picture.load()
    except (ValueError, OSError, UnidentifiedImageError) as error:
        return f"a picture cannot be decoded: {type(error).__name__}"
    size = f"{picture.width}x{picture.height}"
    wanted = body.get("size", size)
    return "" if size == wanted else f"a picture is {size} and should be {wanted}"


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
