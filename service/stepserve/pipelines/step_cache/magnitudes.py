"""The magnitudes of a model, in a file beside it: measured once, read whenever it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepserve.domain.errors import StepserveError

FILE = "step_cache.json"
LEAST_CALLS, MOST_CALLS = 2, 1000


class MagnitudesError(StepserveError):
    """The file of magnitudes cannot be used; the message names it, and says what is wrong."""


@dataclass(frozen=True)
class Calibration:
    """Magnitudes, and what they were measured with, which is for people to read.

    Args:
        magnitudes: of each denoiser call of a request, the first one's being 1.
        size: of the images, such as `512x512`.
        prompts: how many requests there were.
        stepserve: version.
    """

    magnitudes: tuple[float, ...]
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    size: str
    prompts: int
    stepserve: str


def write_magnitudes(folder: Path, calibration: Calibration) -> Path:
    """Write the file of a model's folder anew, and return where it is.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / FILE
    # Whoever loads the model meanwhile reads the one or the other.
    unfinished = path.with_suffix(".json.new")
    unfinished.write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")
    return unfinished.replace(path)


def read_magnitudes(folder: Path) -> tuple[float, ...]:
    """The magnitudes of the model in a folder; none where it has no such file.

    Raises:
        MagnitudesError: there is one that cannot be used.
    """
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(path, f"is not valid JSON: {error}") from error
    return _checked(path, told.get("magnitudes") if isinstance(told, dict) else None)


def digest_of(magnitudes: Sequence[float]) -> str:
    """SHA-256 over magnitudes, in hexadecimal; empty where there are none."""
    if not magnitudes:
        return ""
    return hashlib.sha256(json.dumps(list(magnitudes)).encode()).hexdigest()


def _checked(path: Path, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not LEAST_CALLS <= len(values) <= MOST_CALLS:
        what = f"a list of {LEAST_CALLS} to {MOST_CALLS} numbers"
        raise _wrong(path, f"must hold 'magnitudes', {what}")
    for place, value in enumerate(values):
        if not _is_magnitude(value):
            raise _wrong(path, f"has {value!r} at magnitudes[{place}], which must be over 0")
    return tuple(map(float, values))


def _is_magnitude(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _wrong(path: Path, what: str) -> MagnitudesError:
    return MagnitudesError(
        f"{path} {what}; measure it again with `stepserve calibrate`, or delete it"
    )
