"""The step cache of a request: how its pipeline calls the denoiser, for the engine to count."""

from __future__ import annotations

from collections.abc import Sequence

from stepserve.domain.requests import GenerationRequest
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.engine.tracks.step_cache import CachedPhase, StepCache
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.step_cache.schedule import skipped_calls


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
    # Some that know one way only do not say it.
    order = getattr(model.factory.new_scheduler(request.scheduler), "order", 1)
    return StepCache(
        use,
        [
            CachedPhase(
                guidance.calls_of(part, count),
                guidance.step_of(part).calls,
                order,
                _skipped_steps(model.magnitudes, use, part, count, order),
            )
            for part, count in zip(request.phases, timesteps, strict=True)
        ],
        request.step_cache_kind,
    )


def _skipped_steps(
    magnitudes: Sequence[float],
    use: StepCacheUse,
    request: GenerationRequest,
    timesteps: int,
    order: int,
) -> frozenset[int] | None:
    """The timesteps that are skipped, where magnitudes decide; None: what calls give decides."""
    if use.method is not StepCacheMethod.MAGCACHE:
        return None
    begin = 0.0 if request.strength is None else 1 - request.strength
    # What belongs to one step of the solver is skipped together.
    skipped = skipped_calls(magnitudes, -(-timesteps // order), use.threshold, begin)
    return frozenset(order * step + stage for step in skipped for stage in range(order))
