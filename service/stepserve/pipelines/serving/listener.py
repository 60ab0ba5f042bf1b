"""One request as the engine wants it, and what becomes of it as events for its submitter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from stepserve.domain.checks.trajectory_limits import check_shown_steps
from stepserve.domain.errors import ContentFilteredError
from stepserve.domain.events import (
    Accepted,
    CutPrompt,
    EncodedImage,
    Event,
    Failed,
    Finished,
    Preview,
    Started,
    StepFinished,
)
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.timings import Timings
from stepserve.engine.tracks.listener import tell
from stepserve.engine.tracks.track import Phase, Track, as_stepserve_error
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.controls.cache import ControlCache
from stepserve.pipelines.copies.guidance_interval import narrow_to_interval
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests.encoding import ImageEncoder, Telling
from stepserve.pipelines.requests.hires import calls_of_phases, make_in_phases
from stepserve.pipelines.requests.images import encode_image, encode_preview
from stepserve.pipelines.requests.input_decoding import Inputs
from stepserve.pipelines.requests.step_caching import step_cache_of
from stepserve.pipelines.requests.trajectory import Trajectory

Sink = Callable[[Event], None]
Images = Sequence[Image.Image | None]
"""None in place of one that the pipeline's own safety checker withheld."""


@dataclass(frozen=True)
class RequestListener:
    """Turns what the engine says about one request into events for its sink."""

    request: GenerationRequest
    sink: Sink
    encoder: ImageEncoder
    inputs: Inputs
    fingerprint: Callable[[], str] = str
    withheld: Callable[[int], None] = lambda images: None
    cut_prompts: tuple[CutPrompt, ...] = ()
    trajectory: Trajectory | None = None

    def accepted(self, position: int, expected_s: float) -> None:
        """The request was let in. Told once its images are known to be fine."""
        self.inputs.then(partial(self.sink, Accepted(self.request.id, position, expected_s)))

    def started(self) -> None:
        """The pipeline call begins."""
        self.sink(Started(self.request.id))

    def step_ended(self, step: int, steps: int) -> None:
        """The pipeline call got one step further. Called inside it, where raising would end it."""
        tell(self.request.id, self.sink, StepFinished(self.request.id, step, steps))

    def predicted(self, index: int, step: int, steps: int, images: Images) -> None:
        """What the images will roughly be. Called inside the pipeline call, as `step_ended` is.

        Previews and the images themselves are encoded by one thread, so they stay in order.
        """
        encode = partial(self._encode_preview, index, step, steps, images)
        tell(self.request.id, self.encoder.submit, len(images), encode)

    def finished(self, result: Images, timings: Timings) -> None:
        """Encode off the engine thread: the next forward must not wait for it."""
        self.withheld(sum(image is None for image in result))
        try:
            self.encoder.submit(len(result), partial(self._encode, result, timings))
        except RuntimeError as error:
            # The interpreter is shutting down.
            self.failed(error, timings)

    def failed(self, error: BaseException, timings: Timings) -> None:
        """Cancelled, or the pipeline raised, or an image cannot be read."""
        self.inputs.forget()
        self._release()
        if isinstance(error, ContentFilteredError):
            self.withheld(self.request.n)
        self.sink(Failed(self.request.id, as_stepserve_error(error, self.request.id)))

    def _encode_preview(self, index: int, step: int, steps: int, images: Images) -> Telling:
        files = tuple(encode_preview(image, self.request, i) for i, image in enumerate(images))
        preview = Preview(self.request.id, index, step, steps, files)
        return partial(tell, self.request.id, self.sink, preview)

    def _encode(self, images: Images, timings: Timings) -> Telling:
        try:
            encoded = tuple(self._encoded(image, index) for index, image in enumerate(images))
            self._release()
            finished = Finished(
                self.request.id, encoded, timings, self.fingerprint(), self.cut_prompts
            )
        except Exception as error:
            return partial(tell, self.request.id, self.failed, error, timings)
        return partial(tell, self.request.id, self.sink, finished)

    def _encoded(self, image: Image.Image | None, index: int) -> EncodedImage:
        file = encode_image(image, self.request, index)
        if image is None or self.trajectory is None:
            # Whoever has the latents has the image.
            return file
        return replace(file, trajectory=self.trajectory.encode(index))

    def _release(self) -> None:
        if self.trajectory is not None:
            self.trajectory.release()


def track_of(
    model: LoadedModel,
    adapters: AdapterCache,
    controls: ControlCache,
    request: GenerationRequest,
    listener: RequestListener,
) -> Track:
    """What a request takes of the engine, and how it is run.

    Raises:
        InvalidRequestError: an adapter or a control is not known, or its file cannot be used, or
            more steps are to be shown than may be.
    """
    calls, guidance = calls_of_phases(model, request), model.capabilities.guidance
    check_shown_steps(request, sum(calls))
    variant = adapters.resolve(request.adapters)
    steered, *_ = [
        controls.resolve(part.controls, part.task, bool(part.references)) for part in request.phases
    ]

    def make() -> Images:
        images, steps, previews = listener.inputs.images, listener.step_ended, listener.predicted
        return make_in_phases(
            model,
            request,
            images,
            steps,
            previews,
            partial(controls.steering, steered),
            listener.trajectory,
        )

    return Track(
        id=request.id,
        rows=guidance.rows_of(request),
        phases=tuple(
            Phase(guidance.calls_of(part, count), part.step_size)
            for part, count in zip(request.phases, calls, strict=True)
        ),
        images=request.n,
        run=partial(adapters.run_with, variant, partial(controls.run_with, steered, make)),
        listener=listener,
        # Compared at every tick, and an enumeration's members are slow at that.
        priority=int(request.priority),
        deadline_s=request.deadline_s,
        isolated=request.reproducible,
        variant=variant,
        can_mix=partial(adapters.can_mix, variant),
        guidance_interval=narrow_to_interval(guidance, request, *calls),
        step_cache=step_cache_of(model, request, calls),
        owner=request.owner,
        held=listener.inputs.are_needed,
    )
