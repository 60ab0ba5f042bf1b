"""Tiny control networks with random weights, saved as diffusers folders."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from tiny_model import NATIVE_PX, tiny_unet
from torch import nn


def save_controlnet(folder: Path, seed: int = 0) -> Path:
    """A ControlNet for the UNet of `tiny_model`."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(
        tiny_unet(), conditioning_embedding_out_channels=(4, 4, 8, 8)
    )
    _fill_zeros(network)
    network.save_pretrained(folder)
    return folder


def save_t2i_adapter(folder: Path, channels: int = 1) -> Path:
    """A T2I-Adapter for the UNet of `tiny_model`."""
    torch.manual_seed(7)
    network = T2IAdapter(
        in_channels=channels,
        # Of the order in which this UNet makes its latents smaller, as that of XL does.
        adapter_type="full_adapter_xl",
        channels=[8, 16, 16, 16],
        num_res_blocks=1,
        downscale_factor=16,
    )
    network.save_pretrained(folder)
    return folder


def _fill_zeros(module: nn.Module) -> None:
    """What begins at zero would hide the network."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.5)


def drawing(seed: int = 0, size: int = NATIVE_PX) -> Image.Image:
    """Some light blocks on dark."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def opened(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)
