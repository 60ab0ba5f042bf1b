"""LiteLLM, LangChain's image tool and Vercel's AI SDK against a real server work unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from api_fakes import EMOJI, FakeBackend
from running_clients import run_javascript, run_python
from stepserve.domain.model_status import ModelStatus
from stepserve.domain.tasks import Task
from usual_tasks import USUAL_TASKS

ALIASES = ("dall-e-2", "dall-e-3", "gpt-image-1")


@pytest.fixture
def url(server_port: int, backend: FakeBackend) -> str:
    served = replace(EMOJI, tasks=USUAL_TASKS, aliases=ALIASES)
    backend.statuses = [ModelStatus(served, ready=True)]
    return f"http://127.0.0.1:{server_port}/v1"


def test_litellm(url: str, backend: FakeBackend):
    told = run_python("litellm_images.py", "litellm", url)

    assert told == {"generated": 2, "links": [True], "later": 1, "edited": 1, "refused": True}
    assert [request.task for request in backend.requests] == [
        *[Task.TEXT_TO_IMAGE] * 3,
        Task.INPAINTING,
    ]
    assert {request.model for request in backend.requests} == {"emoji"}


def test_langchain(url: str, backend: FakeBackend):
    told = run_python("langchain_images.py", "langchain_community", url)

    assert told == {"kinds": ["image/png"] * 3, "model": "dall-e-2"}
    assert [(request.prompt, request.n) for request in backend.requests] == [("cat", 2)] * 2


def test_vercels_ai_sdk(javascript: Path, url: str, backend: FakeBackend):
    told = run_javascript("ai_sdk.mjs", javascript, url)

    assert told == {
        "generated": [2] * 4,
        "edited": [1, 1],
        "own": 1,
        "warnings": [],
        "refused": [400, True],
    }
    own = backend.requests[-1]
    assert (own.seed, own.num_inference_steps) == (5, 4)
    edits = [request for request in backend.requests if request.task is Task.INPAINTING]
    assert [request.prompt for request in edits] == ["blue"] * 2
