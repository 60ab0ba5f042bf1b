"""Where models are found: embedded ones in this package, others in local folders."""

from __future__ import annotations

from pathlib import Path

from stepserve.domain.errors import StepserveError
from stepserve.models.modular import modular_refusal

EMBEDDED = Path(__file__).parent / "emoji"


class ModelNotFoundError(StepserveError):
    """A configured model does not exist."""


def model_folder(path: str | None) -> Path:
    """The diffusers folder of a model; None means the embedded one.

    Raises:
        ModelNotFoundError: there is no diffusers pipeline in that folder, or a modular one.
    """
    folder = EMBEDDED if path is None else Path(path).expanduser()
    if refusal := modular_refusal(folder):
        raise ModelNotFoundError(f"{folder} cannot be served: {refusal}")
    if not (folder / "model_index.json").exists():
        raise ModelNotFoundError(
            f"no diffusers pipeline in {folder}: it should hold a model_index.json "
            "(or is it a hub id? Then set revision to the commit that is to be served)"
        )
    return folder
