"""What is told of a model that cannot be loaded: why, without paths and words of libraries."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import OmniGenPipeline, UNet2DConditionModel
from diffusers.utils import is_torchvision_available
from stepserve.config import EngineSettings, ModelSettings, TelemetrySettings
from stepserve.domain.events import Event, Failed
from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.loading.reasons import reason_of
from stepserve.ray_serve.replica.replica import ModelReplica
from tiny_model import a_request, save_tiny_model, tiny_unet
from transformers import Qwen2VLVideoProcessor

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def rebind_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "NoSuchUNet"]
    (folder / "model_index.json").write_text(json.dumps(index))


def other_width(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    config["block_out_channels"] = [64, 64]
    (folder / "unet/config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no diffusers pipeline in its folder"),
        (lambda f: (f / "model_index.json").write_text("{"), "a JSON file of it is not valid JSON"),
        (lambda f: shutil.rmtree(f / "unet"), "a file of it is missing or cannot be read"),
        (lambda f: (f / WEIGHTS).write_bytes(b"cut"), "is cut short, or is no safetensors file"),
        (rebind_class, "its files do not fit together"),
        (other_width, "its files do not fit together"),
    ],
    ids=["index", "JSON", "unet", "weights", "class", "width"],
)
def test_a_reason_is_in_our_words(
    copied: Path, break_it: Callable[[Path], None], reason: str
) -> None:
    break_it(copied)
    with pytest.raises(ModelLoadError) as failed:
        load_model("x", copied, dtype="float32")
    assert reason in failed.value.reason
    assert_public(failed.value.reason, copied)
    assert pickle.loads(pickle.dumps(failed.value)).reason == failed.value.reason


def assert_public(told: str, folder: Path) -> None:
    """Neither a path of this machine nor what a library calls its insides."""
    assert str(folder.parent) not in told
    assert not re.search(r"(?<!\w)/\w+/|\w+Error\b|Traceback|size mismatch|tensor\(|\n", told)


def test_packages_and_memory_are_told() -> None:
    missing = ImportError("cannot import", name="sentencepiece.model")
    assert reason_of(missing) == "it needs the package sentencepiece, which is not installed"
    assert reason_of(torch.OutOfMemoryError("CUDA: 3 GiB")).startswith("its device has too little")


@pytest.fixture
def eight_channels(tmp_path: Path) -> Path:
    """A UNet for instruction edits under the class that gives it latents only."""
    folder = save_tiny_model(tmp_path / "eight")
    config = dict(tiny_unet().config) | {"in_channels": 8}
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@contextmanager
def replica_of(folder: Path) -> Iterator[ModelReplica]:
    settings = ModelSettings(
        path=str(folder), dtype="float32", engine=EngineSettings(threads=1, max_rows=4)
    )
    replica = ModelReplica("x", settings, TelemetrySettings())
    yield replica
    # It tries no more.
    asyncio.run(replica.drain())


async def events_of(replica: ModelReplica, request: GenerationRequest) -> list[Event]:
    return [event async for event in await replica.submit(request)]


def test_a_model_that_makes_no_image_says_what_does_not_fit(eight_channels: Path) -> None:
    with replica_of(eight_channels) as replica:
        status = asyncio.run(replica.status())
    assert not status.ready
    assert status.detail.startswith(
        "cannot be loaded: it was loaded, and fails at its first image: its UNet takes 8 channels, "
        "and StableDiffusionPipeline gives it 4; is it a checkpoint for another pipeline class, "
        "such as one for inpainting?; it is tried again in "
    )
    assert_public(status.detail, eight_channels)


def test_requests_to_it_are_refused_with_the_reason_and_when_to_come_back(tmp_path: Path) -> None:
    with replica_of(tmp_path / "nowhere") as replica:
        [outcome] = asyncio.run(events_of(replica, a_request()))
    assert isinstance(outcome, Failed)
    assert "no diffusers pipeline in its folder" in outcome.error.message
    assert_public(outcome.error.message, tmp_path)
    assert 10 < getattr(outcome.error, "retry_after_s", 0) <= 15


@pytest.mark.skipif(is_torchvision_available(), reason="it is installed")
def test_a_package_that_a_library_misses_is_named() -> None:
    """Those that look at images before a text encoder does need it."""
    with pytest.raises(ImportError) as missing:
        Qwen2VLVideoProcessor()
    assert reason_of(missing.value) == "it needs the package torchvision, which is not installed"
    with pytest.raises(NameError) as left_out:
        OmniGenPipeline(transformer=None, scheduler=None, vae=None, tokenizer=None)
    assert "needs a package that is not installed" in reason_of(left_out.value)
