"""LoRA adapters with random weights for the tiny model, large enough to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from stepserve.domain.requests import AdapterUse, GenerationRequest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut")
TEXT = ("q_proj", "v_proj", "fc1")


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline that Stepserve has never touched, in the same memory layout."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def save_adapter(
    path: Path,
    model: Path,
    seed: int,
    unet: Sequence[str] = ATTENTION,
    text_encoder: Sequence[str] = (),
    rank: int = 4,
    alpha: int = 8,
    dora: bool = False,
) -> Path:
    """Write an adapter for the model in folder `model`, as diffusers' own training scripts do."""
    pipeline = load_plain(model)
    torch.manual_seed(seed)
    parts = {"unet": unet, "text_encoder": text_encoder}
    modules = {name: getattr(pipeline, name) for name, targets in parts.items() if targets}
    for name, module in modules.items():
        # Without dropout in training only; made as if there had been some.
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.5,
            use_dora=dora,
            target_modules=list(parts[name]),
            init_lora_weights=False,
        )
        module.add_adapter(config)
    weights = {f"{name}_lora_layers": _weights(module) for name, module in modules.items()}
    StableDiffusionPipeline.save_lora_weights(
        path.parent, weight_name=path.name, **weights, **_collate_lora_metadata(modules)
    )
    return path


def _weights(module: Any) -> dict[str, torch.Tensor]:
    tensors = get_peft_model_state_dict(module)
    return {name: tensor * (3.0 if "lora_B" in name else 1.0) for name, tensor in tensors.items()}


def with_adapters(pipeline: Any, files: Sequence[Path]) -> Any:
    """The plain way to load them, in their order."""
    for index, path in enumerate(files):
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=f"plain{index}"
        )
    pipeline.unet.eval()
    return pipeline


def call_plain(pipeline: Any, request: GenerationRequest) -> torch.Tensor:
    """One direct pipeline call: images before they are rounded to bytes."""
    seeds = range(request.seed, request.seed + request.n)
    images: torch.Tensor = pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or None,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.n,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images
    return images


def uses(**scales: float) -> tuple[AdapterUse, ...]:
    return tuple(AdapterUse(name, scale) for name, scale in scales.items())
