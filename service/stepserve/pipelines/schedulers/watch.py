"""What a request's own scheduler does, seen and seen to without the pipeline's help."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

SAMPLE_PLACE = 2
"""Of the sample among the arguments of a scheduler's step: output, timestep, sample."""

OnStepOutput = Callable[[int, Any], None]
"""Hears which step has ended, from 1 on, and the latents that it made."""


def watch_steps(scheduler: Any, ended: OnStepOutput) -> None:
    """Call `ended` after every step of a scheduler that one request has to itself.

    Most pipelines take `callback_on_step_end`. PixArt, DeepFloyd IF and unCLIP, among others, do
    not.
    """
    numbers = itertools.count(1)
    after_steps(scheduler, lambda result, *_, **__: ended(next(numbers), result[0]))


def after_steps(scheduler: Any, hear: Callable[..., None]) -> None:
    """Call `hear` after every step, with what it returned and then what it was given."""
    original = scheduler.step

    # Pipelines ask for the signature of `step`, to see what it takes.
    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hear(result, *args, **kwargs)
        return result

    scheduler.step = step


def watch_images(pipeline: Any, hear: Callable[[Any], None]) -> None:
    """Call `hear` with what was decoded before it becomes images, where that can be seen.

    Args:
        pipeline: one that a request has to itself; what it makes images with is replaced.
    """
    processor: Any = getattr(pipeline, "image_processor", None)
    if not hasattr(processor, "postprocess"):
        return
    own = copy.copy(processor)
    original = own.postprocess

    @functools.wraps(original)
    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        hear(image)
        return original(image, *args, **kwargs)

    vars(own)["postprocess"] = postprocess
    vars(pipeline)["image_processor"] = own


def draw_from(scheduler: Any, generators: Sequence[torch.Generator]) -> None:
    """Have a scheduler that one request has to itself draw its noise from these generators.

    Many pipelines hand `generator` on to `step`. Those for flow matching do not, as most of their
    schedulers draw nothing; others would draw from the generator that all requests share.

    DiT has its scheduler step the rows without a class as well: these draw after the others, from
    the same generators.
    """
    original = scheduler.step
    parameters = list(inspect.signature(original).parameters)
    if "generator" not in parameters:
        return
    place = parameters.index("generator")

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= place and kwargs.get("generator") is None:
            sample = args[SAMPLE_PLACE] if len(args) > SAMPLE_PLACE else kwargs["sample"]
            times = max(len(sample) // len(generators), 1)
            kwargs["generator"] = [*generators] * times
        return original(*args, **kwargs)

    scheduler.step = step


def drop_unknown(scheduler: Any) -> None:
    """Have a scheduler that one request has to itself ignore arguments of others' steps.

    Pipelines without a prompt hand on what their own scheduler takes, such as DDIM's `eta`, to
    whichever they have, and schedulers that draw nothing take no `generator`.
    """
    original = scheduler.step
    known = inspect.signature(original).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{n: value for n, value in kwargs.items() if n in known})

    scheduler.step = step
