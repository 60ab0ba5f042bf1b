"""The knobs that make a resident model faster or smaller, applied once when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig

from stepserve.config import SpeedSettings
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.capabilities import denoiser_of
from stepserve.pipelines.facts.trust import read_index

QUANTIZERS = {
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
}
DENOISERS = ("transformer", "unet")
CONVOLUTION_DIMENSIONS = 4
"""Of the weights of a convolution over images."""


def check_speed(speed: SpeedSettings, device: torch.device) -> None:
    """Refuse what cannot work here, before gigabytes are read.

    Raises:
        ModelLoadError: says which setting, and why not.
    """
    if speed.cpu_offload != "none" and device.type != "cuda":
        raise ModelLoadError(f"cpu_offload needs a CUDA device, this one is {device}")
    if speed.cpu_offload != "none" and speed.compile:
        raise ModelLoadError("compile and cpu_offload cannot be combined")
    if speed.quantization != "none" and speed.compile:
        raise ModelLoadError("compile and quantization cannot be combined")
    if speed.quantization != "none" and find_spec("torchao") is None:
        raise ModelLoadError(
            f"quantization {speed.quantization} needs the package torchao: "
            "pip install 'stepserve[quantization]'"
        )


def can_record(speed: SpeedSettings, device: torch.device) -> bool:
    """Whether forwards may be CUDA graphs: modules must stay at fixed addresses."""
    return speed.cuda_graphs and device.type == "cuda" and speed.cpu_offload == "none"


def loading_arguments(speed: SpeedSettings, folder: Path) -> dict[str, Any]:
    """What `from_pretrained` must be given so that the denoiser is quantized while it is read."""
    if speed.quantization == "none":
        return {}
    components = read_index(folder)
    quantizer = getattr(import_module("torchao.quantization"), QUANTIZERS[speed.quantization])
    mapping = {name: TorchAoConfig(quantizer()) for name in DENOISERS if components.get(name)}
    if not mapping:
        raise ModelLoadError("quantization needs a component `transformer` or `unet`")
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}


def settle(pipeline: Any, device: torch.device, speed: SpeedSettings) -> None:
    """Put a pipeline where it is to run, with every knob as it is set.

    Offloading replaces `forward` of the modules it moves. It comes first and `attach` second, so
    that a parked call runs the offloading forward, and not the other way round.
    """
    pipeline.set_progress_bar_config(disable=True)
    for module in _modules(pipeline):
        module.eval()
    _place(pipeline, device, speed)
    for module in _modules_for_channels_last(pipeline, speed.channels_last):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if speed.attention_backend is not None:
        _set_attention_backend(denoiser_of(pipeline), speed.attention_backend)
    if speed.vae_slicing:
        _enable(pipeline, "slicing")
    if speed.vae_tiling:
        _enable(pipeline, "tiling")


def _place(pipeline: Any, device: torch.device, speed: SpeedSettings) -> None:
    if speed.cpu_offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif speed.cpu_offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _modules(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def _modules_for_channels_last(pipeline: Any, wanted: bool | None) -> Iterator[torch.nn.Module]:
    """Where it helps: modules that are made of convolutions.

    With channels last every kernel gives a row the same bits in any batch (bfloat16 on CPU), and
    convolutions are faster on both kinds of device. A transformer has one, its first layer.
    """
    if wanted is False:
        return
    helped = [getattr(pipeline, name, None) for name in ("unet", "vae")]
    for module in _modules(pipeline):
        ranks = {parameter.dim() for parameter in module.parameters()}
        # Torch refuses the format for the convolutions of videos, which some VAEs of images have.
        if (wanted or module in helped) and 4 in ranks and 5 not in ranks:
            yield module


def is_channels_last(module: torch.nn.Module) -> bool:
    """Whether the weights of its convolutions lie with channels last."""
    return any(
        weight.dim() == CONVOLUTION_DIMENSIONS
        and weight.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
        for weight in module.parameters()
    )


def _set_attention_backend(denoiser: Any, name: str) -> None:
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        kind = type(denoiser).__name__
        raise ModelLoadError(f"attention_backend: {kind} always computes attention in one way")
    denoiser.set_attention_backend(name)


def _enable(pipeline: Any, what: str) -> None:
    switch = getattr(getattr(pipeline, "vae", None), f"enable_{what}", None)
    if switch is None:
        raise ModelLoadError(f"vae_{what}: {type(pipeline).__name__} has no VAE that can do it")
    switch()
