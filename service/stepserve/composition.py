"""Builds a model, its engine and what belongs to them from an operator's settings. Knows no Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from stepserve.config import ControlSettings, EngineSettings, IpAdapterSettings, ModelSettings
from stepserve.domain.models import AS_IT_IS
from stepserve.engine.loop.engine import EngineOptions
from stepserve.models.catalogue import model_folder
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.facts.trust import Trust
from stepserve.pipelines.loading.folders import (
    LoadedModel,
    leave_cores_to_engine,
    load_model,
)
from stepserve.pipelines.loading.hub import fetch_files, fetch_model, model_files
from stepserve.pipelines.loading.reasons import first_image_failed
from stepserve.pipelines.references.files import IpAdapterFiles, find_weights
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
    sharing = SharingOptions(
        fixed_rows=settings.engine.fixed_rows,
        mix_lengths=settings.engine.mix_lengths,
        pad_prompts=settings.engine.pad_prompts,
        prompt_cache_bytes=settings.prompt_cache_bytes,
    )
    adapters = adapter_options(settings)
    controls = control_options(settings)
    runner = PipelineRunner(model, engine_options(settings.engine), adapters, sharing, controls)
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
        find_ip_adapters(settings),
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


def find_ip_adapters(settings: ModelSettings) -> list[IpAdapterFiles]:
    """The files of a model's IP-Adapters, downloaded if need be.

    Raises:
        ModelLoadError: some are not there, or cannot be fetched.
    """
    trust = trust_of(settings)
    return [find_ip_adapter(name, one, trust) for name, one in settings.ip_adapters.items()]


def find_ip_adapter(name: str, settings: IpAdapterSettings, trust: Trust) -> IpAdapterFiles:
    """Where the weights of an IP-Adapter and its image encoder are, downloaded if need be.

    Raises:
        ModelLoadError: there are no such weights, or they cannot be fetched.
    """
    encoder = _image_encoder_folder(settings)
    weights = f"{settings.subfolder}/{settings.weight_name}".lstrip("/")
    patterns = [weights] if settings.image_encoder_path else [weights, *model_files(encoder, trust)]
    folder = _local(settings.path, settings.revision, patterns)
    if settings.image_encoder_path is None:
        encoders = folder if folder.is_dir() else folder.parent
    else:
        encoders = _local(
            settings.image_encoder_path,
            settings.image_encoder_revision,
            model_files(encoder, trust),
        )
    found = find_weights(name, folder / settings.subfolder, settings.weight_name)
    return IpAdapterFiles(name, found, encoders / encoder)


def _image_encoder_folder(settings: IpAdapterSettings) -> str:
    """Where in its repository the image encoder of an IP-Adapter is."""
    if settings.image_encoder_folder is None and settings.image_encoder_path:
        return ""
    folder = settings.image_encoder_folder or "image_encoder"
    is_inside = "/" not in folder and settings.image_encoder_path is None
    return f"{settings.subfolder}/{folder}".lstrip("/") if is_inside else folder


def _local(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A folder or file as it is, or what is fetched of a hub's repository."""
    if revision is None:
        return Path(path).expanduser()
    return fetch_files(path, revision, patterns)


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


def control_options(settings: ModelSettings) -> ControlOptions:
    """Where the controls of a model are, downloaded if need be.

    Raises:
        ModelLoadError: they cannot be fetched.
    """
    trust = trust_of(settings)
    return ControlOptions(
        named={name: _control(one, trust) for name, one in settings.controls.items()},
        max_loaded=settings.max_loaded_controls,
        pickle=trust.pickle,
    )


def _control(settings: ControlSettings, trust: Trust) -> ControlSource:
    patterns = model_files(settings.subfolder, trust)
    folder = _local(settings.path, settings.revision, patterns) / settings.subfolder
    preprocessor = "" if settings.preprocessor == AS_IT_IS else settings.preprocessor
    return ControlSource(folder, preprocessor, settings.mode)


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
