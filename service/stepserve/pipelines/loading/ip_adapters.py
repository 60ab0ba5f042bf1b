"""Loading IP-Adapters into a pipeline, before anything else looks at its denoiser.

All are loaded with the model. Loading one later would swap the attention processors under the
requests in flight, and what was found out about sharing, memory and compiled code would no longer
hold.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, SiglipImageProcessor, SiglipVisionModel

from stepserve.domain.tasks import Count, Role, Task, TaskInputs
from stepserve.pipelines.copies.factory import PipelineFactory
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.pipeline_tasks import offered_inputs
from stepserve.pipelines.loading.library_messages import heard_libraries
from stepserve.pipelines.loading.weights import check_heard
from stepserve.pipelines.references.adapters import SD3, ReferenceAdapters, place_of
from stepserve.pipelines.references.denoiser import EmbeddingsPlace
from stepserve.pipelines.references.files import IpAdapterFiles, check_weights

logger = logging.getLogger(__name__)


def load_ip_adapters(pipeline: Any, adapters: Sequence[IpAdapterFiles], allow_pickle: bool) -> None:
    """Load IP-Adapters, and the image encoder if the pipeline has none.

    Call it before the pipeline is put on its device.

    Args:
        pipeline: as it was read.
        adapters: at least one.
        allow_pickle: whether weights are read from pickle files as well.

    Raises:
        ModelLoadError: the pipeline takes none, or one of them does not fit it.
    """
    place = place_of(pipeline)
    if place is SD3 and len(adapters) > 1:
        raise ModelLoadError(
            f"ip_adapters: a {type(pipeline).__name__} takes one IP-Adapter, and {len(adapters)} "
            f"are listed ({_listed(adapters)})"
        )
    layers = {files.name: check_weights(files, allow_pickle) for files in adapters}
    if getattr(pipeline, "image_encoder", None) is None:
        _load_image_encoder(pipeline, place, adapters[0], allow_pickle)
    try:
        with heard_libraries() as heard:
            _load_weights(pipeline, place, adapters)
    except Exception as error:
        # Whatever torch and diffusers raise for layers of another number or width.
        message = f"ip_adapters: {_listed(adapters)} cannot be loaded into a "
        message += f"{type(pipeline).__name__}: {type(error).__name__}: {error}"
        raise ModelLoadError(message, "its IP-Adapters do not fit it") from error
    denoiser = getattr(pipeline, place.component)
    _check_layers(denoiser, layers)
    _cast(denoiser)
    logger.info(
        "IP-Adapters loaded: %s, with %d MB of weights (remarks: %s)",
        _listed(adapters),
        sum(weight.nbytes for weight in _weights(denoiser)) / 1e6,
        "; ".join(heard) or "none",
    )


def inputs_with_references(
    factory: PipelineFactory, adapters: ReferenceAdapters | None
) -> dict[Task, TaskInputs]:
    """The inputs of each task of a model, with references where its pipeline takes them.

    Raises:
        ModelLoadError: no task takes any.
    """
    inputs = offered_inputs(factory.tasks)
    if adapters is None:
        return inputs
    taking = [task for task in inputs if _takes_references(factory, adapters, task)]
    if not taking:
        raise ModelLoadError(f"ip_adapters: references are taken by none of {', '.join(inputs)}")
    references = {Role.REFERENCE: Count(0, adapters.max_images)}
    return inputs | {task: {**inputs[task], **references} for task in taking}


def _takes_references(factory: PipelineFactory, adapters: ReferenceAdapters, task: Task) -> bool:
    # InstructPix2Pix has three rows for an image, of which a reference is for the first.
    is_known = task is not Task.EDIT or adapters.place.component != "unet"
    return is_known and factory.signature(task).accepts("ip_adapter_image_embeds")


def _load_image_encoder(
    pipeline: Any, place: EmbeddingsPlace, files: IpAdapterFiles, allow_pickle: bool
) -> None:
    """The encoder of the first adapter, which is to serve all."""
    folder = files.image_encoder
    if not (folder / "config.json").exists():
        raise ModelLoadError(
            f"ip_adapters.{files.name}: the pipeline has no image encoder, and there is none in "
            f"{folder}; set image_encoder_path or image_encoder_folder",
            "the image encoder of its IP-Adapter is missing",
        )
    kind: Any = SiglipVisionModel if place is SD3 else CLIPVisionModelWithProjection
    with heard_libraries() as heard:
        encoder = kind.from_pretrained(
            folder,
            dtype=pipeline.dtype,
            # None: safetensors where there are any.
            use_safetensors=None if allow_pickle else True,
            local_files_only=True,
        )
    check_heard(heard)
    pipeline.register_modules(image_encoder=encoder)
    if place is SD3 and pipeline.feature_extractor is None:
        pipeline.register_modules(feature_extractor=_siglip_processor(folder, encoder))


def _siglip_processor(folder: Path, encoder: Any) -> Any:
    if (folder / "preprocessor_config.json").exists():
        return SiglipImageProcessor.from_pretrained(folder, local_files_only=True)
    side = encoder.config.image_size
    return SiglipImageProcessor(size={"height": side, "width": side})


def _load_weights(
    pipeline: Any, place: EmbeddingsPlace, adapters: Sequence[IpAdapterFiles]
) -> None:
    folders = [str(files.weights.parent) for files in adapters]
    names = [files.weights.name for files in adapters]
    # Layers are made whole and then filled, so that one that is missing is an error.
    options = {"local_files_only": True, "low_cpu_mem_usage": False}
    if place is SD3:
        pipeline.load_ip_adapter(folders[0], weight_name=names[0], subfolder="", **options)
    else:
        pipeline.load_ip_adapter(folders, weight_name=names, subfolder=[""] * len(names), **options)


def _check_layers(denoiser: nn.Module, layers: dict[str, int | None]) -> None:
    """Refuse adapters of a larger model, whose other layers were left out."""
    own = sum(1 for processor in _processors(denoiser) if hasattr(processor, "to_k_ip"))
    for name, count in layers.items():
        if count not in (None, own):
            raise ModelLoadError(
                f"ip_adapters.{name}: it has {count} attention layers, and the denoiser has {own}",
                "its IP-Adapters do not fit it",
            )


def _cast(denoiser: Any) -> None:
    """What was loaded, to the dtype of the rest."""
    for module in _loaded(denoiser):
        module.to(denoiser.dtype)


def _weights(denoiser: Any) -> list[Tensor]:
    return [weight for module in _loaded(denoiser) for weight in module.parameters()]


def _loaded(denoiser: Any) -> list[nn.Module]:
    """What adapters add to a denoiser."""
    projections = [getattr(denoiser, name, None) for name in ("encoder_hid_proj", "image_proj")]
    modules = (*projections, *_processors(denoiser))
    return [module for module in modules if isinstance(module, nn.Module)]


def _processors(denoiser: Any) -> list[Any]:
    return list(denoiser.attn_processors.values())


def _listed(adapters: Sequence[IpAdapterFiles]) -> str:
    return ", ".join(files.name for files in adapters)
