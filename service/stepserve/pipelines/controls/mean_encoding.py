"""Control images that are encoded without noise.

Some of diffusers' pipelines draw the latents of a control image from torch's global generator, so
that no seed decides them. Taking the mean, which is what is drawn around, makes an image that can
be made again. The distribution of a trained VAE is hardly wider than that.
"""

from __future__ import annotations

from typing import Any


class MeanEncodingVae:
    """The resident VAE in every respect, but for what encoding draws."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode by the resident VAE; the distribution has one value only."""
        output = self._vae.encode(*args, **kwargs)
        output.latent_dist = _Mean(output.latent_dist)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


class _Mean:
    def __init__(self, distribution: Any) -> None:
        self._distribution = distribution

    def sample(self, generator: Any = None) -> Any:
        return self._distribution.mode()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._distribution, name)
