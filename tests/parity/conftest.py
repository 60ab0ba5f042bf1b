from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from parity_cases import ForwardCounter, load_reference

from service.engine.engine import EngineOptions
from service.models.catalogue import EMBEDDED
from service.pipelines.load import load_model
from service.pipelines.runner import PipelineRunner

TEST_MODEL = "STEPSERVE_TEST_MODEL"


def pytest_configure(config: pytest.Config) -> None:
    # numpy's word to torch, by way of diffusers' schedulers.
    config.addinivalue_line("filterwarnings", "ignore:__array_:DeprecationWarning")
    # Mochi turns autocast on for float32, which torch has none of on a CPU.
    config.addinivalue_line("filterwarnings", "ignore:In CPU autocast:UserWarning")


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The embedded model, or the one that STEPSERVE_TEST_MODEL names."""
    folder = Path(os.environ.get(TEST_MODEL, EMBEDDED))
    if not (folder / "model_index.json").exists():
        pytest.fail(f"no model in {folder}; set {TEST_MODEL} to a diffusers folder")
    return folder


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Callable[[str], Any]:
    """A plain pipeline by dtype."""

    @cache
    def load(dtype: str) -> Any:
        return load_reference(model_folder, dtype)

    return load


@pytest.fixture
def serve(model_folder: Path) -> Iterator[Callable[..., tuple[PipelineRunner, ForwardCounter]]]:
    """Starts an engine on a model of its own, and counts its denoiser forwards."""
    started: list[tuple[PipelineRunner, ForwardCounter]] = []

    def start(dtype: str, **options: Any) -> tuple[PipelineRunner, ForwardCounter]:
        model = load_model("emoji", model_folder, dtype, "cpu")
        runner = PipelineRunner(model, EngineOptions(max_waiting_pictures=1000, **options))
        counter = ForwardCounter(model.pipeline.unet)
        runner.start()
        started.append((runner, counter))
        return runner, counter

    yield start
    for runner, counter in started:
        counter.remove()
        runner.stop()
