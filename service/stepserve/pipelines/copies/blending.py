"""Inpainting with a denoiser that was not made for it.

diffusers' inpainting pipelines know two kinds of UNet by the number of input channels: 9 means one
that takes the mask as input; 4 means an ordinary one, for which the kept part is blended in after
each step. Blending has nothing to do with the number, which is that of Stable Diffusion's latents.
A UNet over latents of another width is introduced to them as one of 4 channels.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import FrozenDict

BLENDED_CHANNELS = 4
MASK_CHANNELS = 1


class BlendedDenoiser:
    """The resident UNet in every respect, but for the number of channels in its config."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.config = FrozenDict({**unet.config, "in_channels": BLENDED_CHANNELS})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the resident UNet."""
        return self._unet(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


def denoiser_for_inpainting(pipeline: Any) -> Any:
    """What an inpainting pipeline should be given as its UNet.

    Raises:
        ValueError: its UNet takes neither latents alone nor latents, mask and masked latents.
    """
    unet, latents = pipeline.unet, pipeline.vae.config.latent_channels
    if unet.config.in_channels == 2 * latents + MASK_CHANNELS:
        return unet
    if unet.config.in_channels != latents:
        raise ValueError(f"a UNet of {unet.config.in_channels} input channels cannot inpaint")
    return unet if latents == BLENDED_CHANNELS else BlendedDenoiser(unet)
