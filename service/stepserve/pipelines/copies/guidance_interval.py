"""Guidance at some of the steps only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    guidance: Guidance, request: GenerationRequest, *calls: int
) -> GuidanceInterval | None:
    """Which of the denoiser calls of a request need only the conditional rows.

    Args:
        guidance: of the model.
        request: says from which share of its steps to which it is guided.
        calls: of each of its phases, all of which are guided alike.
    """
    if not guidance.guides(request.guidance_scale) or not request.is_guidance_limited:
        return None
    guided = [request.is_guided(call, count) for count in calls for call in range(count)]
    return GuidanceInterval(guidance.rows_of(request), len(guided), _within(guided))


def _within(guided: Sequence[bool]) -> Callable[[int], bool]:
    """Whether a call is guided; what comes after the expected ones is as the last of these."""
    return lambda call: guided[min(call, len(guided) - 1)]
