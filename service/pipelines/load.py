"""Loading a diffusers folder, and reading off it what the model can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from service.domain.errors import StepserveError
from service.domain.models import ModelCapabilities, SizeRange
from service.pipelines.schedulers import usable_schedulers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MANIFEST = "stepserve.json"


class ModelLoadError(StepserveError):
    """A model could not be loaded; the message says which and why."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A resident pipeline, what it can do, and the scheduler classes it may use by name."""

    pipeline: Any
    capabilities: ModelCapabilities
    schedulers: dict[str, type]


def load_model(
    model_id: str, folder: Path, dtype: str = "bfloat16", device: str = "auto"
) -> LoadedModel:
    """Load a text-to-image pipeline from a local diffusers folder (safetensors only).

    Raises:
        ModelLoadError: the folder is missing or is no such pipeline.
    """
    if not (folder / "model_index.json").exists():
        raise ModelLoadError(f"model {model_id}: {folder} is not a diffusers folder")
    _hush_libraries()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelLoadError(f"model {model_id}: cannot be loaded: {error}") from error
    _settle(pipeline, choose_device(device))
    schedulers = usable_schedulers(pipeline.scheduler)
    capabilities = describe_model(model_id, folder, pipeline, tuple(schedulers))
    return LoadedModel(pipeline, capabilities, schedulers)


def choose_device(wanted: str) -> torch.device:
    """`auto` means the first GPU, or the CPU where there is none."""
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_model(
    model_id: str, folder: Path, pipeline: Any, schedulers: tuple[str, ...]
) -> ModelCapabilities:
    """Limits from the folder's `stepserve.json`, or derived from the pipeline's own shapes."""
    manifest_path = folder / MANIFEST
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    sizes = manifest.pop("sizes", None)
    manifest.setdefault("description", f"{type(pipeline).__name__} from {folder.name}")
    manifest.setdefault("created", int((folder / "model_index.json").stat().st_mtime))
    return ModelCapabilities(
        id=model_id,
        sizes=SizeRange(**sizes) if sizes else derive_sizes(pipeline),
        schedulers=schedulers,
        default_scheduler=manifest.pop("default_scheduler", type(pipeline.scheduler).__name__),
        max_prompt_tokens=pipeline.tokenizer.model_max_length,
        **manifest,
    )


def derive_sizes(pipeline: Any) -> SizeRange:
    """Half to twice the native side, in steps that the UNet can halve as often as it does."""
    halvings = len(pipeline.unet.config.block_out_channels) - 1
    step = pipeline.vae_scale_factor * 2**halvings
    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return SizeRange(minimum=native // 2 // step * step, maximum=native * 2, step=step, native=native)


def _hush_libraries() -> None:
    """Progress bars of a load, and warnings of settings that one scheduler has and another not."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _settle(pipeline: Any, device: torch.device) -> None:
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    # With channels last every kernel gives a row the same bits in any batch (bfloat16 on CPU), and
    # convolutions are faster on both kinds of device.
    for module in (pipeline.unet, pipeline.vae):
        module.to(memory_format=torch.channels_last)
        module.eval()
    pipeline.text_encoder.eval()
