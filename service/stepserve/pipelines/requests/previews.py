"""What the images of a request will roughly be, predicted before its last step.

A scheduler is given the noisy latents and what the network says of them. The two predict the clean
latents, x_0, which the VAE decodes like any others: an intermediate image, not a thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.copies.safety_checker import flagged_previews
from stepserve.pipelines.schedulers.watch import after_steps

OnPreview = Callable[[int, int, int, list[Image.Image | None]], None]
"""Hears index, step, steps and images."""

IMAGE_LATENT_DIMENSIONS = 4


@dataclass(frozen=True)
class Denoised:
    """One evaluation of the network, as the scheduler was given it.

    `sample` are the noisy latents, `output` is what the network said of them with guidance applied,
    `index` the place of the step in the scheduler's `sigmas`, or None where it keeps none.
    """

    sample: torch.Tensor
    output: torch.Tensor
    timestep: Any
    index: int | None


class Observed:
    """Keeps what a request's own scheduler was last given."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.latest: Denoised | None = None
        after_steps(scheduler, self._hear)

    def _hear(
        self, result: Any, output: Any, timestep: Any, sample: Any, *_: Any, **__: Any
    ) -> None:
        after = getattr(self.scheduler, "step_index", None)
        self.latest = Denoised(sample, output, timestep, None if after is None else after - 1)

    def predict(self) -> torch.Tensor | None:
        """The clean latents of the latest evaluation, in the shape of its sample, if it tells."""
        if self.latest is None or not isinstance(self.latest.output, torch.Tensor):
            return None
        if self.latest.output.shape != self.latest.sample.shape:
            return None
        return clean_latents(self.scheduler, self.latest)


def clean_latents(scheduler: Any, seen: Denoised) -> torch.Tensor:
    """x_0 from x_t and the network's output, all of one shape, for each parametrization.

    With x_t = alpha x_0 + sigma noise, the output is the noise, the velocity alpha noise - sigma
    x_0 (Salimans and Ho 2022), or x_0 itself; with flow matching it is noise - x_0.
    """
    sample, output = seen.sample.float(), seen.output.float()
    if is_flow_matching(scheduler):
        return sample - _sigma(scheduler, seen) * output
    alpha, sigma = noise_level(scheduler, seen)
    if is_variance_exploding(scheduler):
        # Such as Euler's, which keep x_t / alpha.
        sample = sample * alpha
    match scheduler.config.get("prediction_type", "epsilon"):
        case "v_prediction":
            return alpha * sample - sigma * output
        case "sample":
            return output
    return (sample - sigma * output) / max(alpha, 1e-4)


def noise_level(scheduler: Any, seen: Denoised) -> tuple[float, float]:
    """Alpha and sigma, whose squares add up to 1, at the moment of an evaluation."""
    if seen.index is not None and getattr(scheduler, "sigmas", None) is not None:
        ratio = _sigma(scheduler, seen)
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha
    timestep = min(max(int(seen.timestep), 0), len(scheduler.alphas_cumprod) - 1)
    squared = float(scheduler.alphas_cumprod[timestep])
    return squared**0.5, (1 - squared) ** 0.5


def _sigma(scheduler: Any, seen: Denoised) -> float:
    """The scheduler's own measure of noise: sigma / alpha, or sigma with flow matching."""
    assert seen.index is not None
    return float(scheduler.sigmas[seen.index])


def is_flow_matching(scheduler: Any) -> bool:
    """Whether x_t = (1 - sigma) x_0 + sigma noise."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def is_variance_exploding(scheduler: Any) -> bool:
    """Whether the scheduler keeps x_0 + (sigma / alpha) noise instead of x_t."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0


def preview_steps(previews: int, steps: int) -> list[int]:
    """After which of `steps` steps (from 1) to make previews: evenly spread, not after the last."""
    return sorted({round(i * steps / (previews + 1)) for i in range(1, previews + 1)} - {0, steps})


def can_preview(pipeline: Any) -> bool:
    """Whether the pipeline's latents can be decoded on the way, or are images themselves."""
    vae = autoencoder_of(pipeline)
    if vae is None:
        # Consistency models' schedulers mix the output with the sample in a way of their own.
        on_pixels = isinstance(getattr(pipeline, "unet", None), UNet2DModel)
        return on_pixels and "prediction_type" in pipeline.scheduler.config
    if getattr(vae.config, "latent_channels", None) is None:
        return False
    # Such a VAE is cast to float32 around the pipeline's own decode; ours would meet it in between.
    return not (getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16)


def autoencoder_of(pipeline: Any) -> Any:
    """What decodes latents to images, or None where there is none, or of another kind."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


class Previewer:
    """Decodes what is predicted at some of a request's steps. Runs inside the request's greenlet.

    Args:
        pipeline: the request's own copy.
        on_preview: hears of each; it must return quickly.
    """

    def __init__(self, pipeline: Any, request: GenerationRequest, on_preview: OnPreview) -> None:
        self._pipeline = pipeline
        self._request = request
        self._on_preview = on_preview
        self._observed = Observed(pipeline.scheduler)

    def step_ended(self, step: int, steps: int) -> None:
        """Make a preview, if it is time to."""
        due = preview_steps(self._request.previews, steps)
        if step not in due:
            return
        latents = self._observed.predict()
        # DiT has its scheduler step the rows without a class as well, behind the others.
        images = (
            None
            if latents is None
            else decode_latents(self._pipeline, self._request, latents[: self._request.n])
        )
        if images is not None:
            self._on_preview(due.index(step), step, steps, images)


def decode_latents(
    pipeline: Any, request: GenerationRequest, latents: torch.Tensor
) -> list[Image.Image | None] | None:
    """Images of latents in the layout that the scheduler has them in, one of each row.

    Returns:
        None in place of an image that the pipeline's own safety checker withholds; None where the
        latents are not those of images.
    """
    vae = autoencoder_of(pipeline)
    if vae is None:
        return _to_images(pipeline, latents)
    if hasattr(pipeline, "_unpack_latents"):
        latents = pipeline._unpack_latents(
            latents, request.height, request.width, pipeline.vae_scale_factor
        )
    shape, config = latents.shape, vae.config
    if len(shape) != IMAGE_LATENT_DIMENSIONS or shape[1] != config.latent_channels:
        return None
    scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    images = _to_images(pipeline, decoded)
    # What the checker would withhold in the end is not to be seen on the way.
    flagged = flagged_previews(pipeline, decoded.detach())
    return [None if index in flagged else image for index, image in enumerate(images)]


def _to_images(pipeline: Any, decoded: torch.Tensor) -> list[Image.Image | None]:
    """Images of what was decoded, of shape (images, channels, height, width), values -1 to 1."""
    processor = getattr(pipeline, "image_processor", None) or VaeImageProcessor()
    images: list[Image.Image | None] = processor.postprocess(decoded.detach(), output_type="pil")
    return images
