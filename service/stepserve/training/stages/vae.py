"""Stage 1: the autoencoder that turns 64 px images into 8x8 latents of 16 channels.

Trained with an L1 loss on pixels and on their gradients, and a small KL term that keeps latents
near a unit Gaussian (Kingma and Welling 2013; the latent-diffusion recipe of Rombach et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional

from stepserve.training.data.images import BACKGROUNDS, mirror, paint, shrink
from stepserve.training.drawing.grids import save_grid
from stepserve.training.loop.fingerprint import describe_settings
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.loop.loop import Trainer


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder and weights of its losses."""

    image_px: int = 64
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (32, 64, 96, 128)
    norm_groups: int = 8
    gradient_weight: float = 0.5
    kl_weight: float = 3e-4
    crop_share: float = 0.25

    @property
    def latent_size(self) -> int:
        """Side of the latents: each block but the last halves the image."""
        return self.image_px >> (len(self.block_channels) - 1)


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained AutoencoderKL; each block but the last halves the image."""
    blocks = len(config.block_channels)
    return AutoencoderKL(
        sample_size=config.image_px,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=config.norm_groups,
    )


def sharpness_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 between the pixel differences of images (n, channels, height, width): sharp edges."""
    difference = made - wanted
    rows = (difference[:, :, 1:] - difference[:, :, :-1]).abs().mean()
    columns = (difference[:, :, :, 1:] - difference[:, :, :, :-1]).abs().mean()
    return rows + columns


class AutoencoderStage:
    """Loss and sample grids of the autoencoder over RGBA artwork (images, 4, 128, 128) uint8."""

    def __init__(
        self, config: AutoencoderConfig, loop: LoopConfig, artwork: torch.Tensor, folder: Path
    ) -> None:
        self.config = config
        self.loop = loop
        self.large = artwork
        self.small = shrink(artwork, config.image_px)
        self.folder = folder
        self.autoencoder = build_autoencoder(config)

    def train(self) -> AutoencoderKL:
        """Train, or finish an interrupted training, and return the autoencoder with EMA weights."""
        modules = nn.ModuleDict({"vae": self.autoencoder})
        origin = describe_settings("vae", self.config)
        origin["artwork.shape"] = str(tuple(self.large.shape))
        Trainer("vae", self.loop, modules, self.loss, self.folder, self.draw_samples, origin).run()
        return self.autoencoder

    def loss(self, step: int, generator: torch.Generator) -> torch.Tensor:
        """Pixels, edges and KL of one batch, in float32 (scalar)."""
        images = self.batch(generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = self.autoencoder.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            made = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        made = made.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        pixels = functional.l1_loss(made, images)
        edges = sharpness_loss(made, images)
        return pixels + self.config.gradient_weight * edges + self.config.kl_weight * kl

    def batch(self, generator: torch.Generator) -> torch.Tensor:
        """(batch, 3, image_px, image_px) in -1..1: whole images and some close-up crops."""
        size = self.loop.batch_size
        crops = round(size * self.config.crop_share)
        chosen = torch.randint(len(self.small), (size,), generator=generator)
        rgba = torch.cat([self.small[chosen[crops:]], self._crops(chosen[:crops], generator)])
        rgba = mirror(rgba, torch.rand(size, generator=generator) < 0.5)
        return paint(rgba, self._backgrounds(size, generator))

    def draw_samples(self, step: int) -> None:
        """Originals above their reconstructions."""
        some = torch.linspace(0, len(self.small) - 1, 12).long()
        colours = torch.tensor(list(BACKGROUNDS.values()))[:12]
        images = paint(self.small[some], colours)
        made = self.autoencoder.decode(self.autoencoder.encode(images).latent_dist.mode()).sample
        save_grid(torch.cat([images, made]), self.folder / f"vae-{step:06d}.png", columns=12)

    def _crops(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        size = self.config.image_px
        room = self.large.shape[-1] - size + 1
        corners = torch.randint(room, (len(chosen), 2), generator=generator).tolist()
        pairs = zip(chosen.tolist(), corners, strict=True)
        cut = [self.large[i, :, y : y + size, x : x + size] for i, (y, x) in pairs]
        return torch.stack(cut) if cut else self.small[:0]

    def _backgrounds(self, size: int, generator: torch.Generator) -> torch.Tensor:
        named = torch.tensor(list(BACKGROUNDS.values()))
        picked = named[torch.randint(len(named), (size,), generator=generator)]
        free = torch.randint(256, (size, 3), generator=generator)
        use_named = torch.rand(size, 1, generator=generator) < 0.6
        return torch.where(use_named, picked, free)
