"""Latents of every picture on every background, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load, save
from tqdm import tqdm

from service.training.files import write_atomically
from service.training.pictures import BACKGROUNDS, paint, shrink


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents, bfloat16, (pictures, backgrounds, 2 mirrorings, channels, size, size)."""

    scaled: torch.Tensor
    scaling_factor: float

    def select(
        self, pictures: Sequence[int], backgrounds: Sequence[int], mirrored: Sequence[bool]
    ) -> torch.Tensor:
        """Latents (batch, channels, size, size) in float32."""
        side = [int(m) for m in mirrored]
        return self.scaled[list(pictures), list(backgrounds), side].float()


@torch.no_grad()
def encode_artwork(autoencoder: AutoencoderKL, artwork: torch.Tensor, path: Path) -> LatentSet:
    """Encode all pictures (pictures, 4, height, width) uint8, or read an earlier result.

    The scaling factor brings the latents to unit variance, as the noise schedule assumes.
    """
    if not path.exists():
        latents = _encode_all(autoencoder, shrink(artwork, autoencoder.config.sample_size))
        scaling_factor = 1 / latents.float().std()
        scaled = (latents.float() * scaling_factor).to(torch.bfloat16)
        write_atomically(path, save({"scaled": scaled, "scaling_factor": scaling_factor}))
    stored = load(path.read_bytes())
    return LatentSet(stored["scaled"], float(stored["scaling_factor"]))


def _encode_all(autoencoder: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    colours = torch.tensor(list(BACKGROUNDS.values()))
    encoded = []
    for picture in tqdm(pictures, desc="latents", unit="picture", mininterval=1):
        painted = paint(picture.expand(len(colours), -1, -1, -1), colours)
        both = torch.cat([painted, painted.flip(-1)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mode = autoencoder.encode(both).latent_dist.mode()
        encoded.append(mode.view(2, len(colours), *mode.shape[1:]).transpose(0, 1))
    return torch.stack(encoded).to(torch.bfloat16)
