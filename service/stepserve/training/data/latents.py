"""Latents of every image on every background, computed once and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load, save
from tqdm import tqdm

from stepserve.training.data.images import BACKGROUNDS, paint, shrink
from stepserve.training.loop.files import write_atomically
from stepserve.training.loop.fingerprint import digest_weights

ORIGIN = "autoencoder"


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents, bfloat16, (images, backgrounds, 2 mirrorings, channels, size, size)."""

    scaled: torch.Tensor
    scaling_factor: float

    def select(
        self, images: Sequence[int], backgrounds: Sequence[int], mirrored: Sequence[bool]
    ) -> torch.Tensor:
        """Latents (batch, channels, size, size) in float32."""
        side = [int(m) for m in mirrored]
        return self.scaled[list(images), list(backgrounds), side].float()


@torch.no_grad()
def encode_artwork(autoencoder: AutoencoderKL, artwork: torch.Tensor, path: Path) -> LatentSet:
    """Encode all images (images, 4, height, width) uint8, or read an earlier result.

    An earlier result of another autoencoder or of other artwork is computed anew. The scaling
    factor brings the latents to unit variance, as the noise schedule assumes.
    """
    origin = digest_weights(autoencoder)
    if path.exists():
        content = path.read_bytes()
        latents = _unpack(content)
        if len(latents.scaled) == len(artwork) and _origin(content) in (None, origin):
            return latents
    encoded = _encode_all(autoencoder, shrink(artwork, autoencoder.config.sample_size))
    scaling_factor = 1 / encoded.float().std()
    scaled = (encoded.float() * scaling_factor).to(torch.bfloat16)
    tensors = {"scaled": scaled, "scaling_factor": scaling_factor}
    content = save(tensors, metadata={ORIGIN: origin})
    write_atomically(path, content)
    return _unpack(content)


def _unpack(content: bytes) -> LatentSet:
    stored = load(content)
    return LatentSet(stored["scaled"], float(stored["scaling_factor"]))


def _origin(content: bytes) -> str | None:
    """The autoencoder's digest in a safetensors header, or None in a file from before it was kept.

    The header is JSON after eight bytes that tell its length.
    """
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata.get(ORIGIN)


def _encode_all(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    colours = torch.tensor(list(BACKGROUNDS.values()))
    encoded = []
    for image in tqdm(images, desc="latents", unit="image", mininterval=1):
        painted = paint(image.expand(len(colours), -1, -1, -1), colours)
        both = torch.cat([painted, painted.flip(-1)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mode = autoencoder.encode(both).latent_dist.mode()
        encoded.append(mode.view(2, len(colours), *mode.shape[1:]).transpose(0, 1))
    return torch.stack(encoded).to(torch.bfloat16)
