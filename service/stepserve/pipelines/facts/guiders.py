"""Guiders: objects of a pipeline that mix the predictions of a step, and hold the guidance scale.

The calls of such pipelines take no scale. Each request has a copy of the guider, and its scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance

SCALE = "guidance_scale"
GUIDER_SCALE = f"guider.{SCALE}"
"""Stands among the arguments that may carry a guidance scale for the attribute of a guider."""


def guiders_of(pipeline: Any) -> Iterator[BaseGuidance]:
    """Those of a pipeline that have a guidance scale."""
    for value in vars(pipeline).values():
        if isinstance(value, BaseGuidance) and hasattr(value, SCALE):
            yield value


def usual_guider_scale(pipeline: Any) -> float | None:
    """The scale of the first guider, as its authors set it; None without a guider."""
    return next((float(getattr(guider, SCALE)) for guider in guiders_of(pipeline)), None)


def set_guidance_scale(pipeline: Any, scale: float) -> None:
    """Give every guider of a request's own pipeline the request's scale.

    One that guides with more than this scale alone is turned off where the scale says no guidance.
    """
    for guider in guiders_of(pipeline):
        setattr(guider, SCALE, scale)
        if scale <= _unguided_scale(guider):
            guider.disable()


def _unguided_scale(guider: BaseGuidance) -> float:
    """The scale that leaves the prediction with the prompt as it is."""
    return 0.0 if getattr(guider, "use_original_formulation", False) else 1.0
