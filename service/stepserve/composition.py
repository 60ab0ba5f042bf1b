"""Builds a model, its engine and what belongs to them from an operator's settings. Knows no Ray."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from stepserve.config import EngineSettings, ModelSettings
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import model_folder
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.facts.trust import Trust
from stepserve.pipelines.loading.folders import (
    LoadedModel,
    leave_cores_to_engine,
    load_model,
)
from stepserve.pipelines.loading.hub import fetch_model
from stepserve.pipelines.loading.reasons import first_image_failed
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up

logger = logging.getLogger(__name__)


def load_runner(model_id: str, settings: ModelSettings) -> PipelineRunner:
    """A loaded model behind a running engine, warmed up, and compiled where that is wanted.

    Raises:
        StepserveError: it cannot be loaded, or makes no image.
    """
    leave_cores_to_engine()
    model = load_configured(model_id, settings)
    sharing = SharingOptions(settings.engine.fixed_rows, settings.prompt_cache_bytes)
    adapters = adapter_options(settings)
    runner = PipelineRunner(model, engine_options(settings.engine), adapters, sharing)
    try:
        runner.start()
        seconds = warm_up(runner)
        logger.info("model %s: the warm-up took %.1f s", model_id, seconds)
        runner.compile()
    except Exception as error:
        runner.stop()
        raise first_image_failed(model_id, model.pipeline, error) from error
    return runner


def load_configured(model_id: str, settings: ModelSettings) -> LoadedModel:
    """A model as an operator's settings say, without an engine.

    Raises:
        ModelNotFoundError: there is no diffusers pipeline in its folder.
        ModelLoadError: it cannot be fetched or loaded.
    """
    return load_model(
        model_id,
        find_model(settings),
        settings.dtype,
        settings.device,
        settings,
        trust_of(settings),
        settings.safety_checker,
    )


def find_model(settings: ModelSettings) -> Path:
    """The diffusers folder of a model; one of a hub is downloaded if it has to be.

    Raises:
        ModelNotFoundError: there is no diffusers pipeline in that folder.
        ModelLoadError: it cannot be fetched.
    """
    if settings.path is None or settings.revision is None:
        return model_folder(settings.path)
    return fetch_model(settings.path, settings.revision, trust_of(settings))


def trust_of(settings: ModelSettings) -> Trust:
    """What an operator allows a model's folder."""
    return Trust(remote_code=settings.trust_remote_code, pickle=settings.allow_pickle)


def adapter_options(settings: ModelSettings) -> AdapterOptions:
    """Where the adapters of a model are, from an operator's settings."""
    return AdapterOptions(
        named={name: Path(path) for name, path in settings.adapters.items()},
        folder=Path(settings.adapters_folder) if settings.adapters_folder else None,
        max_loaded=settings.max_loaded_adapters,
    )


def engine_options(settings: EngineSettings) -> EngineOptions:
    """The engine's options from an operator's settings."""
    return EngineOptions(
        max_rows=settings.max_rows,
        max_pending_images=settings.max_pending_images,
        # Said in so many words, as Ray sets torch's default by the CPUs that a replica reserves.
        threads=settings.threads or os.cpu_count(),
        niceness=settings.niceness,
        gradients=settings.gradients,
    )
