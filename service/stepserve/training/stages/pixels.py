"""A class-conditional denoiser of pixels, by the recipe of DDPM (Ho et al. 2020).

Usually it learns the noise in x_t by their simple loss (equation 14): the mean squared error, with
every timestep drawn equally often.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn
from torch.nn import functional

from stepserve.training.data.labelled import LabelledImages
from stepserve.training.diffusion import NoiseSchedule, Prediction, spread_timesteps
from stepserve.training.drawing.grids import save_grid
from stepserve.training.loop.fingerprint import describe_settings, digest_tensors
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.loop.loop import Trainer

SAMPLE_ROWS = 6
BetaSchedule = Literal["linear", "squaredcos_cap_v2"]
"""Linear betas of DDPM, or the cosine schedule of Nichol and Dhariwal 2021 (arXiv:2102.09672)."""


@dataclass(frozen=True)
class PixelConfig:
    """Shapes of the UNet, and the noise schedule in diffusers' words."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    size_px: int = 32
    channels: int = 1
    block_channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = 1
    attention_head_width: int = 32
    norm_groups: int = 16
    timesteps: int = 1000
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: Prediction = Prediction.EPSILON


def build_unet(config: PixelConfig, classes: int | None) -> UNet2DModel:
    """An untrained UNet whose last block attends over all positions, and whose classes, if
    any, are added to the time embedding.
    """
    plain = len(config.block_channels) - 1
    return UNet2DModel(
        sample_size=config.size_px,
        in_channels=config.channels,
        out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_channels,
        down_block_types=(*("DownBlock2D",) * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * plain),
        attention_head_dim=config.attention_head_width,
        norm_num_groups=config.norm_groups,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=classes,
    )


def build_scheduler(config: PixelConfig) -> DDPMScheduler:
    """Ancestral sampling, from whose settings every other scheduler class is made."""
    return DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction.value,
        variance_type="fixed_small",
        # This clips the predicted x_0 to what pixels can be. `clip_sample` does so too, but only
        # ancestral sampling and DDIM know it.
        thresholding=True,
        sample_max_value=1.0,
        clip_sample=False,
        # Few steps have to begin at the noisiest timestep too.
        timestep_spacing="trailing",
    )


class PixelStage:
    """Loss and sample grids of the denoiser over labelled images."""

    def __init__(
        self, config: PixelConfig, loop: LoopConfig, images: LabelledImages, folder: Path
    ) -> None:
        self.config = config
        self.loop = loop
        self.folder = folder
        self.pixels = torch.from_numpy(images.pixels)
        self.labels = torch.from_numpy(images.labels)
        self.schedule = NoiseSchedule(build_scheduler(config).alphas_cumprod)
        self.unet = build_unet(config, len(images.class_names))
        self.unet.to(memory_format=torch.channels_last)

    def train(self) -> ConsistencyModelPipeline:
        """Train, or finish an interrupted training, and return the assembled pipeline."""
        modules = nn.ModuleDict({"unet": self.unet})
        on_sample, origin = self.draw_samples, self.origin()
        Trainer("pixels", self.loop, modules, self.loss, self.folder, on_sample, origin).run()
        return self.pipeline()

    def origin(self) -> dict[str, str]:
        """What the loss depends on: shapes, noise schedule, images and labels."""
        return {
            **describe_settings("pixels", self.config),
            "images": digest_tensors(self.pixels, self.labels),
        }

    def pipeline(self) -> ConsistencyModelPipeline:
        """Diffusers' pipeline for a class-conditional UNet over pixels, with DDPM's scheduler.

        It is named after consistency models, but its loop is that of DDPM: noise, a class, and one
        scheduler step after each forward.
        """
        return ConsistencyModelPipeline(self.unet, build_scheduler(self.config))

    def loss(self, step: int, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the predictions for one batch (scalar)."""
        x_0, labels = self.batch(generator)
        t = spread_timesteps(len(x_0), self.schedule.timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator)
        x_t = self.schedule.add_noise(x_0, noise, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = self.unet(x_t, t, class_labels=labels).sample
        target = self.schedule.target(self.config.prediction, x_0, noise, t)
        return functional.mse_loss(predicted.float(), target)

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (batch, channels, size, size) in -1..1 and their labels (batch,)."""
        chosen = torch.randint(len(self.labels), (self.loop.batch_size,), generator=generator)
        return self.pixels[chosen].float() / 127.5 - 1, self.labels[chosen]

    def draw_samples(self, step: int) -> None:
        """Every class several times, with the same seeds, so that sheets can be compared."""
        pipeline = self.pipeline()
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        classes = self.unet.config.num_class_embeds
        labels = list(range(classes)) * SAMPLE_ROWS
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = pipeline(
                batch_size=len(labels),
                class_labels=labels,
                num_inference_steps=20,
                generator=[torch.Generator().manual_seed(i) for i in range(len(labels))],
                output_type="pt",
            ).images
        grid = images.float().expand(-1, 3, -1, -1) * 2 - 1
        save_grid(grid, self.folder / f"samples-{step:06d}.png", columns=classes)
