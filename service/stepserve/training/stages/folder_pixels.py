"""A denoiser of the pixels of a person's own images, with or without classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
)
from torch import nn

from stepserve.training.data.images import mirror
from stepserve.training.data.labelled import LabelledImages
from stepserve.training.diffusion import NoiseSchedule, spread_timesteps
from stepserve.training.drawing.grids import save_grid
from stepserve.training.loop.fingerprint import describe_settings, digest_tensors
from stepserve.training.loop.hyperparameters import LoopConfig
from stepserve.training.loop.loop import Trainer
from stepserve.training.stages.pixels import PixelConfig, build_scheduler, build_unet

SAMPLES = 24
SAMPLE_COLUMNS = 8
SAMPLE_STEPS = 20
Precision = Literal["bfloat16", "float32"]
"""Of the forward and backward passes; the weights that are trained are float32."""


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    `snr_gamma` is min-SNR's (None: every timestep counts alike). `offset_noise` is the scale of the
    noise that all pixels of a channel share, so that very dark and very bright images are learned.

    Raises:
        ValueError: a number is out of its range.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    snr_gamma: float | None = None
    offset_noise: float = 0.0
    zero_terminal_snr: bool = False
    precision: Precision = "bfloat16"
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be greater than 0, not {self.snr_gamma}")
        if self.offset_noise < 0:
            raise ValueError(f"offset_noise must be at least 0, not {self.offset_noise}")
        if self.accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps must be at least 1, not {self.accumulation_steps}"
            )
        if self.zero_terminal_snr and self.snr_gamma is not None:
            raise ValueError(
                "snr_gamma gives the noisiest timestep no weight, "
                "so that zero_terminal_snr would not be learned: leave one out"
            )


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each image: a mirroring, and a crop from one `crop_margin_px` larger."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    flip: bool = False
    crop_margin_px: int = 0

    def __post_init__(self) -> None:
        if self.crop_margin_px < 0:
            raise ValueError(f"crop_margin_px must be at least 0, not {self.crop_margin_px}")


def build_folder_scheduler(config: PixelConfig, objective: Objective) -> DDPMScheduler:
    """Ancestral sampling over the schedule that is trained on."""
    scheduler = build_scheduler(config)
    return DDPMScheduler.from_config(
        scheduler.config, rescale_betas_zero_snr=objective.zero_terminal_snr
    )


class FolderStage:
    """Loss and sample grids of the denoiser.

    Args:
        images: `crop_margin_px` larger than what is trained; without class names they have no
            classes.
        folder: where checkpoint and sample grids lie.
    """

    def __init__(
        self,
        config: PixelConfig,
        objective: Objective,
        augmentation: Augmentation,
        loop: LoopConfig,
        images: LabelledImages,
        folder: Path,
    ) -> None:
        self.config = config
        self.objective = objective
        self.augmentation = augmentation
        self.loop = loop
        self.folder = folder
        self.pixels = torch.from_numpy(images.pixels)
        self.labels = torch.from_numpy(images.labels)
        self.classes = len(images.class_names) or None
        self.schedule = NoiseSchedule(build_folder_scheduler(config, objective).alphas_cumprod)
        self.unet = build_unet(config, self.classes)
        self.unet.to(memory_format=torch.channels_last)

    def train(self) -> DiffusionPipeline:
        """Train, or finish an interrupted training, and return the assembled pipeline."""
        Trainer(
            "pixels",
            self.loop,
            nn.ModuleDict({"unet": self.unet}),
            self.loss,
            self.folder,
            self.draw_samples,
            self.origin(),
            self.objective.accumulation_steps,
        ).run()
        return self.pipeline()

    def origin(self) -> dict[str, str]:
        """What the loss depends on: shapes, objective, images and labels."""
        return {
            **describe_settings("pixels", self.config),
            **describe_settings("objective", self.objective),
            **describe_settings("augmentation", self.augmentation),
            "classes": repr(self.classes),
            "images": digest_tensors(self.pixels, self.labels),
        }

    def pipeline(self) -> DiffusionPipeline:
        """Diffusers' pipeline for a UNet over pixels: one with classes, or the one without.

        That with classes is named after consistency models, but its loop is that of DDPM.
        """
        kind = ConsistencyModelPipeline if self.classes else DDPMPipeline
        return kind(self.unet, build_folder_scheduler(self.config, self.objective))

    def loss(self, step: int, generator: torch.Generator) -> torch.Tensor:
        """Weighted squared error of what is predicted for one batch (scalar)."""
        x_0, labels = self.batch(generator)
        t = spread_timesteps(len(x_0), self.schedule.timesteps, generator)
        noise = self.noise(x_0.shape, generator)
        x_t = self.schedule.add_noise(x_0, noise, t)
        with self._autocast():
            predicted = self.unet(x_t, t, class_labels=labels).sample
        target = self.schedule.target(self.config.prediction, x_0, noise, t)
        error = ((predicted.float() - target) ** 2).mean(dim=(1, 2, 3))
        if self.objective.snr_gamma is not None:
            error = error * self.schedule.loss_weight(
                t, self.objective.snr_gamma, self.config.prediction
            )
        return error.mean()

    def noise(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Gaussian noise (batch, channels, height, width), with the offset that was asked for."""
        noise = torch.randn(shape, generator=generator)
        if self.objective.offset_noise == 0:
            return noise
        offset = torch.randn((*shape[:2], 1, 1), generator=generator)
        return noise + self.objective.offset_noise * offset

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images (batch, channels, size, size) in -1..1 and their labels (batch,), if any."""
        count = self.loop.batch_size
        chosen = torch.randint(len(self.pixels), (count,), generator=generator)
        images = self._crop(self.pixels[chosen], generator)
        if self.augmentation.flip:
            images = mirror(images, torch.rand(count, generator=generator) < 0.5)
        labels = self.labels[chosen] if self.classes else None
        return images.float() / 127.5 - 1, labels

    def draw_samples(self, step: int) -> None:
        """The same seeds and classes every time, so that sheets can be compared."""
        pipeline = self.pipeline()
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        classes = (
            {"class_labels": [i % self.classes for i in range(SAMPLES)]} if self.classes else {}
        )
        with self._autocast():
            images = pipeline(
                batch_size=SAMPLES,
                num_inference_steps=min(SAMPLE_STEPS, self.schedule.timesteps),
                generator=[torch.Generator().manual_seed(i) for i in range(SAMPLES)],
                output_type="np",
                **classes,
            ).images
        grid = torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1
        save_grid(grid, self.folder / f"samples-{step:06d}.png", columns=SAMPLE_COLUMNS)

    def _crop(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        margin, size = self.augmentation.crop_margin_px, self.config.size_px
        if margin == 0:
            return images
        corners = torch.randint(margin + 1, (len(images), 2), generator=generator).tolist()
        cut = [
            image[:, top : top + size, left : left + size]
            for image, (top, left) in zip(images, corners, strict=True)
        ]
        return torch.stack(cut)

    def _autocast(self) -> torch.autocast:
        enabled = self.objective.precision == "bfloat16"
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
