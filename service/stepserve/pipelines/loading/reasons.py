"""Why a model cannot be loaded, in words that anybody may read.

What libraries raise names paths and their own insides. That belongs in the log; answers over HTTP
say what kind of fault it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError

from stepserve.domain.errors import EndedError, StepserveError
from stepserve.pipelines.errors import ModelLoadError

NO_FOLDER = "no diffusers pipeline in its folder"
OTHER = "its files do not fit together, or not the pipeline class that its model_index.json names"
PART_MISSING = (
    "its pipeline class needs a package that is not installed, such as torchvision: diffusers left "
    "a part of it out"
)
NO_IMAGE = "it was loaded, and fails at its first image"

# The first that fits counts.
_KINDS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    ((torch.OutOfMemoryError, MemoryError), "its device has too little memory for it"),
    (SafetensorError, "a weights file of it is cut short, or is no safetensors file"),
    (json.JSONDecodeError, "a JSON file of it is not valid JSON"),
    (UnicodeDecodeError, "a text file of it is not UTF-8"),
    (PermissionError, "the server may not read a file of it"),
    (OSError, "a file of it is missing or cannot be read"),
    (EndedError, NO_IMAGE),
    (NameError, PART_MISSING),
)
# As transformers and diffusers name what they miss.
_LIBRARY = re.compile(r"requires the (\S+) library")


def reason_of(error: BaseException) -> str:
    """What to say of an error that was met while a model was loaded."""
    if isinstance(error, ModelLoadError):
        return error.reason
    for kinds, reason in _KINDS:
        if any(isinstance(met, kinds) for met in _behind(error)):
            return reason
    if isinstance(error, ImportError):
        named = _LIBRARY.search(str(error))
        package = named[1].lower() if named else (error.name or "").partition(".")[0]
        return f"it needs the package {package or 'of a library'}, which is not installed"
    # All others of our own.
    return error.message if isinstance(error, StepserveError) else OTHER


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The error itself; libraries raise an OSError for whatever they meet in a file."""
    yield error
    cause = (error.__cause__ or error.__context__) if isinstance(error, OSError) else None
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def first_image_failed(model_id: str, pipeline: Any, error: Exception) -> ModelLoadError:
    """What to raise where a model was loaded, and then made no image."""
    if isinstance(error, ModelLoadError):
        return error
    reason = NO_IMAGE if reason_of(error) == OTHER else reason_of(error)
    hint = _wrong_channels(pipeline)
    reason = f"{reason}: {hint}" if hint else reason
    what = str(error) if isinstance(error, StepserveError) else f"{type(error).__name__}: {error}"
    return ModelLoadError(f"model {model_id}: {reason} ({what})", reason)


def _wrong_channels(pipeline: Any) -> str:
    """Whether its UNet wants more than latents, as those for inpainting and editing do."""
    wanted = _config(pipeline, "unet", "in_channels")
    given = _config(pipeline, "vae", "latent_channels")
    if not isinstance(wanted, int) or not isinstance(given, int) or wanted == given:
        return ""
    name = type(pipeline).__name__
    return (
        f"its UNet takes {wanted} channels, and {name} gives it {given}; "
        "is it a checkpoint for another pipeline class, such as one for inpainting?"
    )


def _config(pipeline: Any, component: str, key: str) -> Any:
    return getattr(getattr(getattr(pipeline, component, None), "config", None), key, None)
