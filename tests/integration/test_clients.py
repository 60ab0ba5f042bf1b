"""Clients by other people against a real service, whose model answers to OpenAI's names."""

from __future__ import annotations

from pathlib import Path

from running_clients import run_javascript, run_python
from running_service import Service


def test_litellm(service: Service):
    told = run_python("litellm_images.py", "litellm", f"{service.url}/v1")

    assert told == {"generated": 2, "links": [True], "later": 1, "edited": 1, "refused": True}


def test_langchain(service: Service):
    told = run_python("langchain_images.py", "langchain_community", f"{service.url}/v1")

    assert told == {"kinds": ["image/png"] * 3, "model": "dall-e-2"}


def test_clients_of_npm(javascript: Path, service: Service):
    vercels = run_javascript("ai_sdk.mjs", javascript, f"{service.url}/v1")
    openais = run_javascript("openai_images.mjs", javascript, f"{service.url}/v1")

    assert (vercels["generated"], vercels["edited"], vercels["refused"]) == (
        [2] * 4,
        [1, 1],
        [400, True],
    )
    assert (openais["edited"], openais["varied"], openais["models"]) == (1, True, ["emoji"])
    assert openais["streamed"][-1] == "image_generation.completed"
