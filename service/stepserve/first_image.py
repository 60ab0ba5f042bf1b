"""What a newcomer sees when the service is ready: an image made through HTTP, and how to go on."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import typer

from stepserve.usual_bodies import usual_body

PROMPT = "rocket on a blue background"
REQUEST_TIMEOUT_S = 120.0


def greet(url: str, folder: Path | None, model: str, needs_key: bool = False) -> None:
    """Print where the service is; with a folder, make one image into it first.

    Where a key is needed that is left out: only its hash is known here.

    Args:
        model: the id of the default one.
    """
    typer.echo(f"ready: {url}  (API: {url}/docs)")
    if folder is not None and needs_key:
        typer.echo("first image: left out, as it takes an API key")
    elif folder is not None:
        typer.echo(f"first image: {_try_to_make_one(url, folder, model)}")
    body = _body(url, model, "red heart", needs_key)
    told = json.dumps({"prompt": "red heart"} if body is None else body)
    key = ' -H "Authorization: Bearer $STEPSERVE_API_KEY"' if needs_key else ""
    typer.echo(
        f"try:\n  curl -s {url}/v1/images/generations -H 'Content-Type: application/json'{key} \\\n"
        f"""    -d '{told}' | """
        """python3 -c 'import base64, json, sys; """
        """open("heart.png", "wb").write(base64.b64decode("""
        """json.load(sys.stdin)["data"][0]["b64_json"]))'\n"""
        "Ctrl-C stops the service."
    )


def _body(url: str, model: str, prompt: str, needs_key: bool = False) -> dict[str, Any] | None:
    """What to ask the default model for; None where it needs an image."""
    if needs_key:
        return {"prompt": prompt}
    try:
        told = httpx.get(f"{url}/v1/models/{model}", timeout=REQUEST_TIMEOUT_S, trust_env=False)
        return usual_body(told.raise_for_status().json(), prompt)
    except httpx.HTTPError:
        # Whatever it is, the request itself will meet it too.
        return {"prompt": prompt}


def _try_to_make_one(url: str, folder: Path, model: str) -> str:
    """Where it is, or why there is none: a service that cannot make this one may make others."""
    body = _body(url, model, PROMPT)
    if body is None:
        return f"left out, as model {model} needs one to begin with"
    try:
        return str(make_first_image(url, folder, body))
    except httpx.HTTPStatusError as error:
        return f"not made: {error.response.text}"
    except httpx.HTTPError as error:
        return f"not made: {error!r}"
    except OSError as error:
        return f"made, and not written to {folder}: {error.strerror or error}"


def make_first_image(url: str, folder: Path, body: Mapping[str, Any]) -> Path:
    """Ask the running service for an image and write it to `folder`."""
    response = httpx.post(
        f"{url}/v1/images/generations",
        json={**body, "seed": 2},
        timeout=REQUEST_TIMEOUT_S,
        trust_env=False,
    )
    response.raise_for_status()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "first-image.png"
    path.write_bytes(base64.b64decode(response.json()["data"][0]["b64_json"]))
    return path
