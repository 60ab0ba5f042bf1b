"""The steps of pipelines that tell nobody of them, seen at their scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

OnStepOutput = Callable[[int, Any], None]
"""Hears which step has ended, from 1 on, and the latents that it made."""


def watch_steps(scheduler: Any, ended: OnStepOutput) -> None:
    """Call `ended` after every step of a scheduler that one request has to itself.

    Most pipelines take `callback_on_step_end`. PixArt, DeepFloyd IF and unCLIP, among others, do
    not.
    """
    original = scheduler.step
    steps = 0

    # Pipelines ask for the signature of `step`, to see what it takes.
    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        result = original(*args, **kwargs)
        steps += 1
        ended(steps, result[0])
        return result

    scheduler.step = step
