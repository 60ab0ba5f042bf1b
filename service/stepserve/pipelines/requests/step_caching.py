"""The step cache of a request: how its pipeline calls the denoiser, for the engine to count."""

from __future__ import annotations

from collections.abc import Sequence

from stepserve.domain.requests import GenerationRequest
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from stepserve.pipelines.loading.folders import LoadedModel


def step_cache_of(
    model: LoadedModel, request: GenerationRequest, timesteps: Sequence[int]
) -> StepCache | None:
    """What decides which denoiser calls of a request are skipped; None: none is.

    Args:
        model: that is asked.
        request: with or without `hires`.
        timesteps: of each of its phases.
    """
    use = request.step_cache
    if use is None:
        return None
    guidance = model.capabilities.guidance
    order = model.factory.new_scheduler(request.scheduler).order
    return StepCache(
        use,
        [
            CachedPhase(guidance.calls_of(part, count), guidance.step_of(part).calls, order)
            for part, count in zip(request.phases, timesteps, strict=True)
        ],
        request.step_cache_kind,
    )
