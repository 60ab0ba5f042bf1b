"""Both directions of a diffusion model as image strips, drawn by the model itself.

Forward (Ho et al. 2020, arXiv:2006.11239): an image is noised in closed form until it is static.
Reverse (Song et al. 2021, arXiv:2010.02502): static becomes an image, and beside each state stands
the clean image that the model has in mind there. `docs/diffusion.md` explains the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from stepserve.training.diffusion import NoiseSchedule
from stepserve.training.drawing.grids import save_png, to_image
from stepserve.training.drawing.strips import draw_strip
from stepserve.training.errors import ModelNotExplainableError

COLUMNS = 8


@dataclass(frozen=True)
class Moment:
    """One step of the reverse process: `x_t` and the guided `velocity`, (1, channels, h, w)."""

    timestep: int
    x_t: torch.Tensor
    velocity: torch.Tensor


def explain(
    pipeline_folder: Path, out: Path, prompt: str, seed: int = 0, steps: int = 20
) -> list[Path]:
    """Write `explain-forward.png` and `explain-reverse.png` into the folder `out`.

    Needs nothing but the model: the image that is noised is one it made from the prompt.

    Args:
        pipeline_folder: a diffusers folder of a Stable Diffusion layout with velocity prediction.
        steps: denoising steps of the reverse strip, 1 or more; about eight are shown.

    Raises:
        ModelNotExplainableError: the folder holds no such pipeline.
    """
    pipeline = load_for_explaining(pipeline_folder)
    moments, image = denoise(pipeline, prompt, seed, steps)
    strips = {
        "explain-forward.png": forward_strip(pipeline, image, seed),
        "explain-reverse.png": reverse_strip(pipeline, moments),
    }
    return [save_png(strip, out / name) for name, strip in strips.items()]


def load_for_explaining(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in float32 with a DDIM scheduler.

    Raises:
        ModelNotExplainableError: there is none, or it does not predict velocities.
    """
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotExplainableError(f"no diffusers pipeline in {folder}: {error}") from error
    predicts = pipeline.scheduler.config.prediction_type
    if predicts != "v_prediction":
        raise ModelNotExplainableError(f"{folder} predicts {predicts}, not v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def denoise(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    seed: int,
    steps: int,
    guidance_scale: float = 4.0,
) -> tuple[list[Moment], torch.Tensor]:
    """Run the pipeline, recording every step.

    Returns:
        The moments from the noisiest to the cleanest, and the image (3, height, width) in -1..1.
    """
    plain = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(plain.config)
    moments = record_steps(pipeline.scheduler)
    try:
        images = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
    finally:
        pipeline.scheduler = plain
    return moments, images[0].float() * 2 - 1


def record_steps(scheduler: Any) -> list[Moment]:
    """A list that fills with the moments of every `step` call of this scheduler instance."""
    moments: list[Moment] = []
    plain_step = scheduler.step

    @wraps(plain_step)
    def step(velocity: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor, **options: Any) -> Any:
        moments.append(Moment(int(t), x_t.clone(), velocity.clone()))
        return plain_step(velocity, t, x_t, **options)

    scheduler.step = step
    return moments


@torch.no_grad()
def forward_strip(
    pipeline: StableDiffusionPipeline, image: torch.Tensor, seed: int, columns: int = COLUMNS
) -> Image.Image:
    """An image (3, height, width) in -1..1, ever noisier: its pixels above, its latents below."""
    schedule = schedule_of(pipeline)
    # Denser at the start, where the image is lost.
    t = (torch.linspace(0, 1, columns) ** 1.5 * (schedule.timesteps - 1)).round().long()
    generator = torch.Generator().manual_seed(seed)
    clean = image[None]
    latents = pipeline.vae.encode(clean).latent_dist.mode() * pipeline.vae.config.scaling_factor
    rows = [_noised(schedule, x_0, t, generator) for x_0 in (clean, latents)]
    return draw_strip(
        {
            "pixels": [to_image(pixels) for pixels in rows[0]],
            "latents,\ndecoded": decode(pipeline, rows[1]),
        },
        [f"t = {timestep}" for timestep in t.tolist()],
    )


@torch.no_grad()
def reverse_strip(
    pipeline: StableDiffusionPipeline, moments: Sequence[Moment], columns: int = COLUMNS
) -> Image.Image:
    """From static to an image: x_t above, the clean sample that is predicted from it below."""
    shown = [moments[index] for index in spread(len(moments), columns)]
    t = torch.tensor([moment.timestep for moment in shown])
    x_t = torch.cat([moment.x_t for moment in shown])
    velocity = torch.cat([moment.velocity for moment in shown])
    x_0 = schedule_of(pipeline).predict_x_0(x_t, velocity, t)
    return draw_strip(
        {"x_t": decode(pipeline, x_t), "predicted\nx_0": decode(pipeline, x_0)},
        [f"t = {moment.timestep}" for moment in shown],
    )


def decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Scaled latents (batch, channels, height, width) as images."""
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return [to_image(one) for one in pixels]


def schedule_of(pipeline: StableDiffusionPipeline) -> NoiseSchedule:
    """The noise schedule that the pipeline's scheduler was made with."""
    return NoiseSchedule(pipeline.scheduler.alphas_cumprod)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the indices 0 to `count` - 1, evenly, with the first and the last."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]


def _noised(
    schedule: NoiseSchedule, x_0: torch.Tensor, t: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One sample (1, ...) at every timestep t (batch,), with the same noise."""
    noise = torch.randn(x_0.shape, generator=generator)
    return schedule.add_noise(x_0.expand(len(t), -1, -1, -1), noise, t)
