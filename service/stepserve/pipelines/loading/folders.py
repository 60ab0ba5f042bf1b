"""Loading a diffusers folder: any pipeline that makes images from what requests can give."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from cachetools import LRUCache
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from stepserve.config import SpeedSettings
from stepserve.domain.models import ModelCapabilities
from stepserve.models.modular import modular_refusal
from stepserve.pipelines.copies.factory import PipelineFactory
from stepserve.pipelines.copies.guidance_interval import can_limit_guidance
from stepserve.pipelines.copies.safety_checker import CHECKER, has_checker, names_checker
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.capabilities import (
    Facts,
    check_is_served,
    check_steps,
    denoiser_of,
    describe_model,
    read_manifest,
)
from stepserve.pipelines.facts.fingerprint import take_fingerprint
from stepserve.pipelines.facts.own_code import possible_dtype, scales_noise
from stepserve.pipelines.facts.prompts import PromptMeter, measure_prompts
from stepserve.pipelines.facts.signature import read_signature
from stepserve.pipelines.facts.trust import Trust, check_trust, find_pipeline_class
from stepserve.pipelines.facts.upscalers import OF_ONE_SCHEDULER
from stepserve.pipelines.loading.ip_adapters import inputs_with_references, load_ip_adapters
from stepserve.pipelines.loading.library_messages import heard_libraries
from stepserve.pipelines.loading.reasons import NO_FOLDER, reason_of
from stepserve.pipelines.loading.speed import can_record, check_speed, loading_arguments, settle
from stepserve.pipelines.loading.step_caches import find_step_caches
from stepserve.pipelines.loading.step_limits import (
    probed_schedulers,
    scheduler_steps,
    with_scheduler_steps,
)
from stepserve.pipelines.loading.weights import check_finite_weights, check_heard
from stepserve.pipelines.modules.perturbed_rows import hold_perturbed_rows
from stepserve.pipelines.modules.third_party.pinned_noise import can_keep_on_host
from stepserve.pipelines.modules.wrappers import Wrappers, wrap_modules
from stepserve.pipelines.references.adapters import ReferenceAdapters, hold_references
from stepserve.pipelines.references.files import IpAdapterFiles, files_of
from stepserve.pipelines.schedulers.usable import unusable_schedulers, usable_schedulers
from stepserve.pipelines.step_cache.magnitudes import digest_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A resident pipeline, what it can do, and the scheduler classes it may use by name.

    `compiles` says whether its denoiser is to be compiled.
    `cuda_graphs` says whether its forwards may be recorded.
    `sizes_are_said` says whether its own file says which sizes it takes.
    `probed_schedulers` are those that can be tried without the network.
    `references` are its IP-Adapters, if it has any.
    `magnitudes` of its denoiser calls decide which of them MagCache skips; empty: it has none.
    `denoiser_calls` caches how often the denoiser is called, by what decides it.
    """

    pipeline: Any
    capabilities: ModelCapabilities
    schedulers: dict[str, type]
    prompt_meter: PromptMeter
    factory: PipelineFactory
    compiles: bool = False
    cuda_graphs: bool = False
    sizes_are_said: bool = False
    probed_schedulers: frozenset[str] = frozenset()
    references: ReferenceAdapters | None = None
    magnitudes: tuple[float, ...] = ()
    denoiser_calls: LRUCache[Hashable, int] = field(default_factory=lambda: LRUCache(1024))


def load_model(
    model_id: str,
    folder: Path,
    dtype: str = "bfloat16",
    device: str = "auto",
    speed: SpeedSettings | None = None,
    trust: Trust | None = None,
    safety_checker: Literal["keep", "drop"] = "keep",
    ip_adapters: Sequence[IpAdapterFiles] = (),
) -> LoadedModel:
    """Load a pipeline that makes images from a local diffusers folder.

    Without `trust`, weights are read from safetensors only, and no code that lies in the folder is
    run. With a `safety_checker` of `drop`, the folder's own is left out. The IP-Adapters are loaded
    with it, all at once.

    Raises:
        ModelLoadError: the folder is missing or is no such pipeline, a setting does not fit it, or
            it asks for more trust than it is given.
    """
    if refusal := modular_refusal(folder):
        raise ModelLoadError(f"model {model_id}: cannot be loaded: {refusal}", refusal)
    if not (folder / "model_index.json").exists():
        message = f"model {model_id}: {folder} is not a diffusers folder"
        raise ModelLoadError(message, NO_FOLDER)
    if dtype not in DTYPES:
        raise ModelLoadError(f"model {model_id}: dtype {dtype!r} is none of {', '.join(DTYPES)}")
    hush_libraries()
    trust = trust or Trust()
    try:
        check_trust(folder, trust)
        speed = speed or SpeedSettings()
        knobs = Knobs(DTYPES[dtype], device, speed, trust, safety_checker, ip_adapters)
        return _load(model_id, folder, knobs)
    except ModelLoadError as error:
        message = f"model {model_id}: cannot be loaded: {error.message}"
        raise ModelLoadError(message, error.reason) from error
    except Exception as error:
        # Whatever the libraries raise for a file that is cut short or says something else.
        message = f"model {model_id}: cannot be loaded: {type(error).__name__}: {error}"
        raise ModelLoadError(message, reason_of(error)) from error


@dataclass(frozen=True)
class Knobs:
    """How an operator wants a model to be loaded."""

    dtype: torch.dtype
    device: str
    speed: SpeedSettings
    trust: Trust
    safety_checker: Literal["keep", "drop"]
    ip_adapters: Sequence[IpAdapterFiles] = ()


def _load(model_id: str, folder: Path, knobs: Knobs) -> LoadedModel:
    chosen, speed = choose_device(knobs.device), knobs.speed
    check_speed(speed, chosen)
    step_caches = find_step_caches(model_id, folder, speed.step_cache)
    if knobs.ip_adapters and speed.quantization != "none":
        raise ModelLoadError("ip_adapters and quantization cannot be combined")
    manifest = read_manifest(folder)
    pipeline_class = find_pipeline_class(folder)
    signature = read_signature(pipeline_class)
    check_is_served(pipeline_class, signature)
    knobs = replace(knobs, dtype=possible_dtype(pipeline_class, knobs.dtype))
    pipeline = _read_pipeline(folder, knobs)
    if knobs.ip_adapters:
        load_ip_adapters(pipeline, knobs.ip_adapters, knobs.trust.pickle)
    check_steps(pipeline.scheduler)
    settle(pipeline, chosen, speed)
    check_finite_weights(pipeline)
    if speed.compile and denoiser_of(pipeline) is None:
        raise ModelLoadError("compile needs a component `transformer` or `unet`")
    schedulers = schedulers_for(pipeline, scales_noise(pipeline_class, signature))
    meter = measure_prompts(
        pipeline,
        signature.default("max_sequence_length", int),
        manifest.get("max_prompt_tokens"),
    )
    facts = Facts(signature, tuple(schedulers), meter.limit)
    references = _hold_references(pipeline, knobs)
    keeps_on_host = can_keep_on_host(pipeline, chosen) and not speed.compile
    scales = {} if references is None else references.wrap
    device = chosen if keeps_on_host else None
    perturbed = hold_perturbed_rows(pipeline)
    wrap_modules(pipeline, Wrappers(scales, perturbed, device))
    factory = PipelineFactory(pipeline, schedulers, keeps_on_host)
    capabilities = replace(
        describe_model(model_id, folder, pipeline, facts, manifest),
        tasks=inputs_with_references(factory, references),
        ip_adapters=() if references is None else references.names,
        guidance_interval=can_limit_guidance(pipeline),
        step_cache_methods=step_caches.methods,
        default_step_cache=step_caches.default,
        fingerprint=replace(
            take_fingerprint(folder, knobs.dtype, pipeline.device, files_of(knobs.ip_adapters)),
            step_cache=digest_of(step_caches.magnitudes),
        ),
        safety_checker=has_checker(pipeline),
        unusable_schedulers=unusable_schedulers(schedulers),
    )
    probed = probed_schedulers(factory, capabilities)
    return LoadedModel(
        pipeline,
        with_scheduler_steps(capabilities, scheduler_steps(factory, capabilities, probed)),
        schedulers,
        meter,
        factory,
        compiles=speed.compile,
        cuda_graphs=can_record(speed, chosen),
        sizes_are_said="sizes" in manifest,
        probed_schedulers=probed,
        references=references,
        magnitudes=step_caches.magnitudes,
    )


def schedulers_for(pipeline: Any, scales_noise: bool) -> dict[str, type]:
    """Scheduler classes by name that the requests of a pipeline may use, sorted."""
    own = type(pipeline.scheduler)
    if type(pipeline).__name__ in OF_ONE_SCHEDULER:
        return {own.__name__: own}
    return usable_schedulers(pipeline.scheduler, scales_noise)


def _hold_references(pipeline: Any, knobs: Knobs) -> ReferenceAdapters | None:
    """The pipeline's IP-Adapters, ready for requests with references of their own."""
    names = [files.name for files in knobs.ip_adapters]
    return hold_references(pipeline, names) if names else None


def _read_pipeline(folder: Path, knobs: Knobs) -> Any:
    left_out: dict[str, Any] = {}
    if knobs.safety_checker == "drop" and names_checker(folder):
        left_out = {CHECKER: None}
    with heard_libraries() as heard:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            dtype=knobs.dtype,
            # None: safetensors where there are any.
            use_safetensors=None if knobs.trust.pickle else True,
            local_files_only=True,
            trust_remote_code=knobs.trust.remote_code,
            **loading_arguments(knobs.speed, folder),
            **left_out,
        )
    check_heard(heard)
    return pipeline


def leave_cores_to_engine() -> None:
    """Call before loading: no thread but the engine's is to start OpenMP threads of its own.

    Each thread that runs torch gets a team of its own. Once the teams together outnumber the cores,
    libgomp no longer spins between two operations, which halves the speed of a small model.
    """
    torch.set_num_threads(1)


def choose_device(wanted: str) -> torch.device:
    """`auto` means the first GPU, or the CPU where there is none."""
    if wanted != "auto":
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hush_libraries() -> None:
    """No bars of a load, nor warnings of settings that one scheduler has and another has not."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
