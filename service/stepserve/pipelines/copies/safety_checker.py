"""What a pipeline's own safety checker says of its images: diffusers then paints them black."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stepserve.domain.errors import ContentFilteredError
from stepserve.pipelines.facts.trust import read_index

# Of Stable Diffusion and kin, and of DeepFloyd's IF: a list of truths, or None without a checker.
VERDICTS = ("nsfw_content_detected", "nsfw_detected", "watermark_detected")
# Said by Cosmos, whose checker looks at the prompt first and raises no class of its own.
GUARDRAIL = "Guardrail detected"
CHECKER = "safety_checker"


def withheld_images(output: Any) -> frozenset[int]:
    """Which images of a pipeline's output its checker flagged."""
    verdicts = (getattr(output, name, None) or () for name in VERDICTS)
    return frozenset(i for flags in verdicts for i, is_flagged in enumerate(flags) if is_flagged)


@contextmanager
def guardrail(model_id: str) -> Iterator[None]:
    """Tell what a pipeline raises because its checker refuses the prompt as what it is.

    Raises:
        ContentFilteredError: the checker refused it.
    """
    try:
        yield
    except ValueError as error:
        if GUARDRAIL not in str(error):
            raise
        message = f"the safety checker of model {model_id} refused the prompt"
        raise ContentFilteredError(message) from error


def names_checker(folder: Path) -> bool:
    """Whether a folder's index has a checker."""
    return any(read_index(folder).get(CHECKER) or ())


def has_checker(pipeline: Any) -> bool:
    """Whether images are looked at before they are given out."""
    return getattr(pipeline, CHECKER, None) is not None


def remove_checker(pipeline: Any, unless: bool = False) -> None:
    """Take the checker from a pipeline that one request has to itself."""
    if has_checker(pipeline) and not unless:
        vars(pipeline)[CHECKER] = None


def flagged_previews(pipeline: Any, decoded: torch.Tensor) -> frozenset[int]:
    """Which predicted images the checker flags.

    Args:
        pipeline: a copy that one request has to itself.
        decoded: of shape (images, channels, height, width), values -1 to 1.
    """
    if not has_checker(pipeline) or not hasattr(pipeline, "run_safety_checker"):
        return frozenset()
    # A VAE may be kept in another precision than the checker.
    dtype = getattr(pipeline.safety_checker, "dtype", decoded.dtype)
    checked = pipeline.run_safety_checker(decoded.clone(), decoded.device, dtype)
    return frozenset(i for flags in checked[1:] for i, flag in enumerate(flags or ()) if flag)
