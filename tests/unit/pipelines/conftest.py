from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED, save_tiny_model


def pytest_configure(config: pytest.Config) -> None:
    # numpy's word to torch, by way of diffusers' schedulers: an error here would make them seem
    # unusable.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:__array_:DeprecationWarning",
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), description="tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model("tiny", tiny_folder, dtype="float32", device="cpu")


@pytest.fixture
def runner(tiny: LoadedModel) -> Iterator[PipelineRunner]:
    made = PipelineRunner(tiny, EngineOptions(max_rows=16, max_pending_images=8), sharing=UNTRIED)
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _everywhere(one_thread: None) -> None:
    """All modules here are tiny."""
