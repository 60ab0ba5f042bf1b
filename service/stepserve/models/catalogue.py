"""Where models are found: embedded ones in this package, others in local folders."""

from __future__ import annotations

from pathlib import Path

from stepserve.domain.errors import StepserveError
from stepserve.models.modular import modular_refusal

EMBEDDED = Path(__file__).parent / "emoji"
SCHEME = "embedded:"
"""What the path of an embedded model begins with; its name follows."""


class ModelNotFoundError(StepserveError):
    """A configured model does not exist."""


def model_folder(path: str | None) -> Path:
    """The diffusers folder of a model; `embedded:NAME` is one of this package, None its emoji.

    Raises:
        ModelNotFoundError: there is no diffusers pipeline in that folder, or a modular one, or no
            embedded model of that name.
    """
    if path is None:
        return EMBEDDED
    if path.startswith(SCHEME):
        return _embedded(path.removeprefix(SCHEME))
    folder = Path(path).expanduser()
    if refusal := modular_refusal(folder):
        raise ModelNotFoundError(f"{folder} cannot be served: {refusal}")
    if not (folder / "model_index.json").exists():
        raise ModelNotFoundError(
            f"no diffusers pipeline in {folder}: it should hold a model_index.json "
            "(or is it a hub id? Then set revision to the commit that is to be served)"
        )
    return folder


def embedded_models() -> dict[str, Path]:
    """The folders of the models in this package, by name."""
    files = sorted(Path(__file__).parent.glob("*/model_index.json"))
    return {file.parent.name: file.parent for file in files}


def _embedded(name: str) -> Path:
    found = embedded_models()
    if name not in found:
        raise ModelNotFoundError(
            f"there is no embedded model {name!r}; there are: {', '.join(found)}"
        )
    return found[name]
