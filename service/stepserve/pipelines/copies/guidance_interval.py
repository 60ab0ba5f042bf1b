"""Guidance at some of the steps only."""

from __future__ import annotations

from typing import Any

from stepserve.domain.guidance import Guidance
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.calls.guidance_interval import GuidanceInterval

# Pipelines that put both halves of classifier-free guidance into one denoiser call, the conditional
# rows last, and mix the answers as `u + g * (c - u)`. Others call twice, or put them the other way.
CONDITIONAL_ROWS_LAST = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
    }
)


def can_limit_guidance(pipeline: Any) -> bool:
    """Whether guidance may be limited to an interval without the pipeline's help."""
    if type(pipeline).__name__ not in CONDITIONAL_ROWS_LAST:
        return False
    # Distilled UNets take the guidance scale as an input, and no second half.
    unet = getattr(pipeline, "unet", None)
    return unet is None or unet.config.time_cond_proj_dim is None


def narrow_to_interval(
    guidance: Guidance, request: GenerationRequest, calls: int
) -> GuidanceInterval | None:
    """Which of the `calls` denoiser calls of a request need only the conditional rows."""
    if not guidance.guides(request.guidance_scale) or not request.is_guidance_limited:
        return None
    rows = guidance.rows_of(request)
    return GuidanceInterval(rows, calls, lambda call: request.is_guided(call, calls))
