"""A request as the engine wants it."""

from __future__ import annotations

from functools import partial

from stepserve.domain.requests import GenerationRequest
from stepserve.engine.tracks.track import Track
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.copies.guidance_interval import narrow_to_interval
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests.call import denoiser_calls, make_images
from stepserve.pipelines.serving.listener import Images, RequestListener


def track_of(
    model: LoadedModel,
    adapters: AdapterCache,
    request: GenerationRequest,
    listener: RequestListener,
) -> Track:
    """What a request takes of the engine, and how it is run.

    Raises:
        InvalidRequestError: an adapter is not known, or its file cannot be used.
    """
    calls = denoiser_calls(model, request)
    guidance = model.capabilities.guidance
    variant = adapters.resolve(request.adapters)

    def make() -> Images:
        images, steps, previews = listener.inputs.images, listener.step_ended, listener.predicted
        return make_images(model, request, images, steps, previews)

    return Track(
        id=request.id,
        rows=guidance.rows_of(request),
        steps=guidance.calls_of(request, calls),
        images=request.n,
        run=partial(adapters.run_with, variant, make),
        listener=listener,
        # Compared at every tick, and an enumeration's members are slow at that.
        priority=int(request.priority),
        deadline_s=request.deadline_s,
        isolated=request.reproducible,
        size=(request.width, request.height),
        variant=variant,
        guidance_interval=narrow_to_interval(guidance, request, calls),
        owner=request.owner,
        held=listener.inputs.are_needed,
    )
