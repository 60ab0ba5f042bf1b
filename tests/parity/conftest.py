from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import ForwardCounter, load_reference, rows_are_independent
from same_bytes_cases import save_adapters, serving
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner

TEST_MODEL = "STEPSERVE_TEST_MODEL"


def pytest_configure(config: pytest.Config) -> None:
    # numpy's word to torch, by way of diffusers' schedulers.
    config.addinivalue_line("filterwarnings", "ignore:__array_:DeprecationWarning")
    # Mochi turns autocast on for float32, which torch has none of on a CPU.
    config.addinivalue_line("filterwarnings", "ignore:In CPU autocast:UserWarning")


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The embedded model, or the one that STEPSERVE_TEST_MODEL names."""
    folder = Path(os.environ.get(TEST_MODEL) or EMBEDDED)
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
        engine = EngineOptions(max_pending_images=1000, **options)
        # Rows that fill forwards up would be counted with the rest.
        runner = PipelineRunner(model, engine, sharing=SharingOptions(fixed_rows=False))
        runner.start()
        # Not before: the engine tries some requests of its own when it starts.
        counter = ForwardCounter(model.pipeline.unet)
        started.append((runner, counter))
        return runner, counter

    yield start
    for runner, counter in started:
        counter.remove()
        runner.stop()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder with adapters of the model."""
    return save_adapters(tmp_path_factory.mktemp("adapters"), model_folder)


@pytest.fixture(scope="module")
def served(model_folder: Path, adapters: Path) -> Iterator[PipelineRunner]:
    """The model with its adapters, in bfloat16."""
    with serving(model_folder, "bfloat16", adapters) as runner:
        yield runner


@pytest.fixture(scope="session")
def batch_invariant(reference: Callable[[str], Any]) -> bool:
    """Whether this CPU gives a denoiser row the same bits in any batch, in bfloat16.

    Only the denoiser is asked: text encoder and VAE run call by call, as they are not independent.
    """
    pipeline = reference("bfloat16")
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, tokens, unet.config.cross_attention_dim, generator=generator).bfloat16()

    def denoise(sample: torch.Tensor) -> torch.Tensor:
        return unet(sample, 500, text.repeat(sample.shape[0], 1, 1)).sample

    def random(width: int, height: int) -> torch.Tensor:
        scale = pipeline.vae_scale_factor
        shape = 6, unet.config.in_channels, height // scale, width // scale
        return torch.randn(shape, generator=generator).bfloat16()

    return all(rows_are_independent(denoise, random(*size)) for size in ((64, 64), (96, 64)))
