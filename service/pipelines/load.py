"""Loading a diffusers folder, and reading off it what the model can do."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from service.domain.errors import StepserveError
from service.domain.models import ModelCapabilities, SizeRange
from service.pipelines.fingerprint import take_fingerprint
from service.pipelines.guidance import can_limit_guidance
from service.pipelines.lending import PipelineLender
from service.pipelines.prompts import PromptMeter
from service.pipelines.schedulers import usable_schedulers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MANIFEST = "stepserve.json"


class ModelLoadError(StepserveError):
    """A model could not be loaded; the message says which and why."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A resident pipeline, what it can do, and the scheduler classes it may use by name.

    `denoiser_calls` remembers how often the denoiser is called, by what decides it.
    """

    pipeline: Any
    capabilities: ModelCapabilities
    schedulers: dict[str, type]
    prompt_meter: PromptMeter
    lender: PipelineLender
    denoiser_calls: dict[Hashable, int] = field(default_factory=dict)


def load_model(
    model_id: str, folder: Path, dtype: str = "bfloat16", device: str = "auto"
) -> LoadedModel:
    """Load a text-to-image pipeline from a local diffusers folder (safetensors only).

    Raises:
        ModelLoadError: the folder is missing or is no such pipeline.
    """
    if not (folder / "model_index.json").exists():
        raise ModelLoadError(f"model {model_id}: {folder} is not a diffusers folder")
    if dtype not in DTYPES:
        raise ModelLoadError(f"model {model_id}: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    _hush_libraries()
    try:
        return _load(model_id, folder, DTYPES[dtype], device)
    except Exception as error:
        # Whatever the libraries raise for a file that is cut short or says something else.
        kind = type(error).__name__
        raise ModelLoadError(f"model {model_id}: cannot be loaded: {kind}: {error}") from error


def _load(model_id: str, folder: Path, dtype: torch.dtype, device: str) -> LoadedModel:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    _settle(pipeline, choose_device(device))
    schedulers = usable_schedulers(pipeline.scheduler)
    capabilities = describe_model(model_id, folder, pipeline, tuple(schedulers))
    meter = PromptMeter(pipeline.tokenizer)
    lender = PipelineLender(pipeline, schedulers)
    capabilities = replace(
        capabilities,
        tasks=lender.tasks,
        guidance_interval=can_limit_guidance(pipeline),
        fingerprint=take_fingerprint(folder, dtype, pipeline.device),
    )
    return LoadedModel(pipeline, capabilities, schedulers, meter, lender)


def leave_cores_to_engine() -> None:
    """Call before loading: no thread but the engine's is to start OpenMP threads of its own.

    Each thread that runs torch gets a team of its own. Once the teams together outnumber the cores,
    libgomp no longer spins between two operations, which halves the speed of a small model.
    """
    torch.set_num_threads(1)


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
    derived = {
        "description": f"{type(pipeline).__name__} from {folder.name}",
        "created": int((folder / "model_index.json").stat().st_mtime),
        "default_scheduler": type(pipeline.scheduler).__name__,
    }
    capabilities = ModelCapabilities(
        id=model_id,
        sizes=SizeRange(**sizes) if sizes else derive_sizes(pipeline),
        schedulers=schedulers,
        max_prompt_tokens=pipeline.tokenizer.model_max_length,
        **(derived | manifest),
    )
    if capabilities.default_scheduler not in schedulers:
        raise ValueError(
            f"its default scheduler {capabilities.default_scheduler} is none of those it can use: "
            f"{', '.join(schedulers)}"
        )
    return capabilities


def derive_sizes(pipeline: Any) -> SizeRange:
    """Half to twice the native side, in steps that the UNet can halve as often as it does."""
    halvings = len(pipeline.unet.config.block_out_channels) - 1
    step = pipeline.vae_scale_factor * 2**halvings
    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    minimum = max(native // 2 // step, 1) * step
    return SizeRange(minimum=minimum, maximum=native * 2, step=step, native=native)


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
