"""Whose fault is it that a pipeline call failed: the request's settings, or the server's?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, MappingProxyType
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from transformers import ImageProcessingMixin

from stepserve.domain.errors import GenerationFailedError, InvalidRequestError, StepserveError
from stepserve.domain.requests import GenerationRequest
from stepserve.engine.device_errors import is_out_of_memory
from stepserve.pipelines.schedulers.probes import MakeScheduler, ScheduleError, try_all

MOST_SAID_CHARACTERS = 300
FIELDS: Mapping[str, str] = MappingProxyType(
    {"prompt": "prompt", "image": "image", "mask": "mask", "mask_image": "mask"}
)
"""What pipelines quote when they refuse an input, and its field."""

_QUOTED = re.compile(r"`(\w+)`")


@contextmanager
def blaming_settings(request: GenerationRequest, make: MakeScheduler) -> Iterator[None]:
    """Around a pipeline call: where a request's settings alone make it fail, its answer says so.

    That is so where a scheduler or a pipeline refuses its settings, and where every step of the
    scheduler is done with the same settings but without a network, and fails too.

    Args:
        request: whose call it is.
        make: makes a fresh scheduler of the request's.

    Raises:
        InvalidRequestError: instead of what the call raised.
    """
    try:
        yield
    except Exception as error:
        blamed = _blamed(error, request, make)
        if blamed is None:
            raise
        raise blamed from error


def cannot_be_done(request: GenerationRequest, why: object) -> InvalidRequestError:
    """The answer to a request whose scheduler cannot do its steps."""
    strength = "" if request.strength is None else f" with strength {request.strength:g}"
    return InvalidRequestError(
        f"num_inference_steps {request.num_inference_steps}{strength} cannot be done by "
        f"{request.scheduler} ({why}): choose another number, or another scheduler",
        "num_inference_steps",
    )


def _blamed(
    error: Exception, request: GenerationRequest, make: MakeScheduler
) -> InvalidRequestError | None:
    is_overflow = isinstance(error, GenerationFailedError)
    if is_out_of_memory(error) or (isinstance(error, StepserveError) and not is_overflow):
        return None
    if (refused := _refused_input(error)) is not None:
        return refused
    if why := _refused(error):
        return cannot_be_done(request, f"{why}: {error}")
    if is_overflow or any(isinstance(owner, SchedulerMixin) for _, owner in _callers(error)):
        try:
            try_all(make, request.num_inference_steps)
        except ScheduleError as why:
            return cannot_be_done(request, why)
    return None


def _refused_input(error: Exception) -> InvalidRequestError | None:
    """Of an error about what a request brings along: which field, and what is wrong with it."""
    said = str(error)[:MOST_SAID_CHARACTERS]
    for frame, owner in _callers(error):
        name = frame.f_code.co_name
        if isinstance(owner, DiffusionPipeline) and name == "check_inputs":
            quoted = _QUOTED.search(said)
            field = FIELDS.get(quoted[1]) if quoted else None
            if field is not None:
                message = f"{field} is not one that {type(owner).__name__} takes: {said}"
                return InvalidRequestError(message, field)
        if isinstance(error, ValueError) and _prepares_images(name, owner):
            return InvalidRequestError(f"image is not one that the model takes: {said}", "image")
    return None


def _prepares_images(function: str, owner: Any) -> bool:
    is_processor = isinstance(owner, VaeImageProcessor | ImageProcessingMixin)
    return function == "check_image_input" or (is_processor and function != "postprocess")


def _refused(error: Exception) -> str:
    """Who looked at the settings and would not have them, or nothing."""
    for frame, owner in _callers(error):
        name = frame.f_code.co_name
        if (isinstance(owner, SchedulerMixin) and name == "set_timesteps") or (
            isinstance(owner, DiffusionPipeline) and name == "check_inputs"
        ):
            return f"{type(owner).__name__} refuses"
        if name == "retrieve_timesteps":
            return "the pipeline cannot set its timesteps"
    return ""


def _callers(error: Exception) -> Iterator[tuple[FrameType, Any]]:
    """The frames that an error came through, each with the object whose method it is."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_frame.f_locals.get("self")
        trace = trace.tb_next
