"""Requests whose images are drawn small, enlarged, and refined by image-to-image.

The two pipeline calls run one after the other within one track, over the same modules, and draw
from the same generators: what comes out is what two plain calls give, each going on with the noise
where the other stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from PIL import Image

from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.pipelines.controls.steering import Steering
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests.call import (
    NO_IMAGES,
    OnStep,
    Phase,
    denoiser_calls,
    generators_of,
    make_images,
)
from stepserve.pipelines.requests.inputs import InputImages
from stepserve.pipelines.requests.previews import OnPreview
from stepserve.pipelines.requests.trajectory import Trajectory

Images = list[Image.Image | None]
"""None in place of one that the pipeline's own safety checker withheld."""


def calls_of_phases(model: LoadedModel, request: GenerationRequest) -> list[int]:
    """How often each phase of a request calls the denoiser.

    Raises:
        InvalidRequestError: the scheduler cannot do that number of steps.
    """
    calls = []
    for number, part in enumerate(request.phases):
        with _naming_fields_of(number):
            calls.append(denoiser_calls(model, part))
    return calls


def make_in_phases(
    model: LoadedModel,
    request: GenerationRequest,
    inputs: InputImages = NO_IMAGES,
    on_step: OnStep | None = None,
    on_preview: OnPreview | None = None,
    steering: Callable[[Task], Steering | None] = lambda task: None,
    trajectory: Trajectory | None = None,
) -> Images:
    """Make the images of a request, enlarged and refined if it asks for that.

    Steps are counted through all phases, and so are previews. An image that is withheld in any of
    them is withheld.

    Args:
        model: that is asked.
        request: with or without `hires`.
        inputs: the images that it brings along.
        on_step: hears of each step.
        on_preview: hears of each preview.
        steering: what its controls are to a task.
        trajectory: gets the steps of a request without `hires`.

    Raises:
        ContentFilteredError: the pipeline's own safety checker withheld all images of a phase.
        GenerationFailedError: the denoiser's or the VAE's numbers overflowed.
    """
    generators, calls = generators_of(request), calls_of_phases(model, request)
    images: Images = []
    for number, part in enumerate(request.phases):
        if number:
            inputs = enlarged(images, inputs, part)
        phase = Phase(generators, sum(calls[:number]), sum(calls[number + 1 :]))
        with _naming_fields_of(number):
            steered = steering(part.task)
            made = make_images(model, part, inputs, on_step, on_preview, steered, phase, trajectory)
        images = _withheld_before(images, made)
    return images


@contextmanager
def _naming_fields_of(number: int) -> Iterator[None]:
    """Tell what is wrong with a phase by the names of the fields that the request has for it.

    Raises:
        InvalidRequestError: the settings of the phase cannot be done.
    """
    try:
        yield
    except InvalidRequestError as error:
        if number == 0 or error.field is None:
            raise
        raise InvalidRequestError(f"hires.{error.message}", f"hires.{error.field}") from error


def enlarged(
    images: Sequence[Image.Image | None], inputs: InputImages, part: GenerationRequest
) -> InputImages:
    """What a phase starts from: the images of the one before, in its own size.

    Args:
        images: in place of one that was withheld a black one is gone on with, as diffusers does.
        inputs: of the phase before.
        part: the phase.
    """
    size = part.width, part.height
    return replace(
        inputs,
        images=tuple(
            Image.new("RGB", size) if image is None else _resized(image, size) for image in images
        ),
        controls=inputs.enlarged_controls,
    )


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def _withheld_before(before: Images, images: Images) -> Images:
    """The images without those that were withheld before."""
    if not before:
        return images
    return [
        None if earlier is None else image for earlier, image in zip(before, images, strict=True)
    ]
