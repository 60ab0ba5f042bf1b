"""Which step caches the requests of a model may have, and which is its default."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from stepserve.config import StepCacheSettings
from stepserve.domain.step_cache import StepCacheMethod, StepCacheUse
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.step_cache.magnitudes import FILE, MagnitudesError, read_magnitudes

logger = logging.getLogger(__name__)

NOT_CALIBRATED = f"its step_cache.method is magcache, and it has no {FILE} that can be used"


@dataclass(frozen=True)
class StepCaches:
    """What requests may use.

    Args:
        methods: that they may name.
        default: of those that say none; None: no call is skipped.
        magnitudes: that magcache decides by; empty: there are none.
    """

    methods: tuple[StepCacheMethod, ...]
    default: StepCacheUse | None
    magnitudes: tuple[float, ...]


def find_step_caches(model_id: str, folder: Path, settings: StepCacheSettings | None) -> StepCaches:
    """What the model in a folder has. One whose magnitudes cannot be used is without magcache.

    Raises:
        ModelLoadError: its default wants magnitudes, and there are none that can be used.
    """
    magnitudes, problem = _read(model_id, folder)
    methods = [StepCacheMethod.EASYCACHE]
    if magnitudes:
        methods.append(StepCacheMethod.MAGCACHE)
    default = None if settings is None else settings.use()
    if default is not None and default.method not in methods:
        what = problem or f"measure it with `stepserve calibrate {model_id}`"
        raise ModelLoadError(f"{NOT_CALIBRATED}: {what}", NOT_CALIBRATED)
    return StepCaches(tuple(methods), default, magnitudes)


def _read(model_id: str, folder: Path) -> tuple[tuple[float, ...], str]:
    """The magnitudes, and why they cannot be used."""
    try:
        return read_magnitudes(folder), ""
    except MagnitudesError as error:
        logger.warning("model %s has no magcache: %s", model_id, error)
        return (), error.message
