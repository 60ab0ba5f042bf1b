"""What a newcomer sees when the service is ready: an image made through HTTP, and how to go on."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import typer

PROMPT = "rocket on a blue background"
REQUEST_TIMEOUT_S = 120.0


def greet(url: str, folder: Path | None, needs_key: bool = False) -> None:
    """Print where the service is; with a folder, make one image into it first.

    Where a key is needed that is left out: only its hash is known here.
    """
    typer.echo(f"ready: {url}  (API: {url}/docs)")
    if folder is not None and needs_key:
        typer.echo("first image: left out, as it takes an API key")
    elif folder is not None:
        typer.echo(f"first image: {_try_to_make_one(url, folder)}")
    key = ' -H "Authorization: Bearer $STEPSERVE_API_KEY"' if needs_key else ""
    typer.echo(
        f"try:\n  curl -s {url}/v1/images/generations -H 'Content-Type: application/json'{key} \\\n"
        """    -d '{"prompt": "red heart"}' | """
        """python3 -c 'import base64, json, sys; """
        """open("heart.png", "wb").write(base64.b64decode("""
        """json.load(sys.stdin)["data"][0]["b64_json"]))'\n"""
        "Ctrl-C stops the service."
    )


def _try_to_make_one(url: str, folder: Path) -> str:
    """Where it is, or why there is none: a service that cannot make this one may make others."""
    try:
        return str(make_first_image(url, folder))
    except httpx.HTTPStatusError as error:
        return f"not made: {error.response.text}"
    except httpx.HTTPError as error:
        return f"not made: {error!r}"
    except OSError as error:
        return f"made, and not written to {folder}: {error.strerror or error}"


def make_first_image(url: str, folder: Path) -> Path:
    """Ask the running service for an image and write it to `folder`."""
    response = httpx.post(
        f"{url}/v1/images/generations",
        json={"prompt": PROMPT, "seed": 2},
        timeout=REQUEST_TIMEOUT_S,
        trust_env=False,
    )
    response.raise_for_status()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "first-image.png"
    path.write_bytes(base64.b64decode(response.json()["data"][0]["b64_json"]))
    return path
