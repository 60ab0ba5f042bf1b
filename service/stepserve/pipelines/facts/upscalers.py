"""What is read off a pipeline that makes an image larger: how many times, and of which images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from stepserve.domain.models import SizeRange
from stepserve.pipelines.errors import ModelLoadError

MOST_OVER_NATIVE = 4
"""Largest sides, over those that the model was trained at: upscalers see a part at a time."""

# Their UNets are given the noise as their own scheduler says it.
OF_ONE_SCHEDULER = frozenset({"StableDiffusionLatentUpscalePipeline"})


@dataclass(frozen=True)
class Upscaler:
    """What one upscaler does.

    Args:
        factor: from the sides of the image to those of the result.
        image_step_px: sides of the image are multiples of this.
        native_px: side of the results that it was trained with.
        max_noise_level: most noise that it adds to the image, in steps of its own, or None where
            it adds none.
        least_steps: sides of the image, in steps, that it cannot do with fewer.
    """

    factor: int
    image_step_px: int
    native_px: int
    max_noise_level: int | None = None
    least_steps: int = 1

    @property
    def sizes(self) -> SizeRange:
        """Of the results."""
        step = self.factor * self.image_step_px
        least, most = self.least_steps * step, MOST_OVER_NATIVE * self.native_px // step * step
        return SizeRange(minimum=least, maximum=max(most, least), step=step, native=self.native_px)


def read_upscaler(pipeline: Any) -> Upscaler:
    """What an upscaler does.

    Raises:
        ModelLoadError: its class is none that we know.
    """
    name = type(pipeline).__name__
    read = _READERS.get(name)
    if read is None:
        known = ", ".join(_READERS)
        raise ModelLoadError(f"{name} is no upscaler that is served (those are: {known})")
    return read(pipeline)


def _four_times(pipeline: Any) -> Upscaler:
    """Latents are as large as the image, and a VAE makes four pixels of each."""
    factor = int(pipeline.vae_scale_factor)
    config = pipeline.unet.config
    most_noise = int(pipeline.config.max_noise_level)
    return Upscaler(factor, _halvings(config), config.sample_size * factor, most_noise)


def _of_latents(pipeline: Any) -> Upscaler:
    """Latents are twice as large as those of the image; the smallest are padded by mirroring."""
    scale, config = int(pipeline.vae_scale_factor), pipeline.unet.config
    latent_step = max(_halvings(config) // 2, 1)
    return Upscaler(2, scale * latent_step, config.sample_size * scale, least_steps=2)


def _of_codes(pipeline: Any) -> Upscaler:
    """The pipeline itself cuts images to multiples of 32 pixels."""
    factor = 2 ** (len(pipeline.vqvae.config.block_out_channels) - 1)
    config = pipeline.unet.config
    return Upscaler(factor, math.lcm(32, _halvings(config)), config.sample_size * factor)


def _of_pixels(pipeline: Any) -> Upscaler:
    """DeepFloyd's second stage: made for four times, it takes the size of the result besides."""
    factor, config = 4, pipeline.unet.config
    step = math.lcm(_halvings(config), factor) // factor
    most_noise = pipeline.image_noising_scheduler.config.num_train_timesteps - 1
    return Upscaler(factor, step, int(config.sample_size), int(most_noise))


def _halvings(config: Any) -> int:
    """A UNet halves its input between its levels."""
    return 2 ** (len(config.block_out_channels) - 1)


_READERS: Mapping[str, Callable[[Any], Upscaler]] = MappingProxyType(
    {
        "StableDiffusionUpscalePipeline": _four_times,
        "StableDiffusionLatentUpscalePipeline": _of_latents,
        "LDMSuperResolutionPipeline": _of_codes,
        "IFSuperResolutionPipeline": _of_pixels,
    }
)
