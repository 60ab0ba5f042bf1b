"""How a request's controls become arguments of a call of diffusers' own class for them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
from PIL import Image

from stepserve.domain.models import ControlKind
from stepserve.domain.requests import ControlUse
from stepserve.domain.tasks import Task
from stepserve.pipelines.controls.files import FoundControl
from stepserve.pipelines.controls.mean_encoding import MeanEncodingVae
from stepserve.pipelines.copies.blending import denoiser_for_inpainting
from stepserve.pipelines.facts.signature import CallSignature, read_signature


@dataclass(frozen=True)
class Steering:
    """Requests of one task with these controls: what is called, over the resident modules.

    Args:
        pipeline: of diffusers' class for the task and the kind of network.
        controls: in the order of the request; their networks are loaded.
        networks: theirs.
    """

    pipeline: Any
    controls: Sequence[FoundControl]
    networks: Sequence[Any]

    @property
    def signature(self) -> CallSignature:
        """What a call takes."""
        return read_signature(type(self.pipeline))

    def arguments(
        self, uses: Sequence[ControlUse], images: Sequence[Image.Image]
    ) -> dict[str, Any]:
        """What a call takes of the request's controls.

        Args:
            uses: what the request says of each.
            images: of the request's size, in RGB.
        """
        image = "control_image" if self.signature.accepts("control_image") else "image"
        values: dict[str, list[Any]] = {
            image: [
                _as_taken(network, each)
                for network, each in zip(self.networks, images, strict=True)
            ],
            "controlnet_conditioning_scale": [use.scale for use in uses],
            "adapter_conditioning_scale": [use.scale for use in uses],
            "control_guidance_start": [use.start for use in uses],
            "control_guidance_end": [use.end for use in uses],
            "control_mode": [control.mode for control in self.controls],
        }
        if self._is_union:
            # It takes lists, of whatever length.
            return values
        if self.controls[0].mode is None:
            del values["control_mode"]
        if len(self.controls) == 1:
            return {name: value[0] for name, value in values.items()}
        return values

    @property
    def _is_union(self) -> bool:
        return self.controls[0].kind.kind is ControlKind.UNION


def steering_pipeline(
    resident: Any, task: Task, controls: Sequence[FoundControl], networks: Sequence[Any]
) -> Any:
    """A pipeline that calls these networks beside the resident modules.

    Args:
        resident: what it shares its modules with.
        task: which the kind of the networks has a class for.
        controls: of one kind.
        networks: of each.
    """
    kind = controls[0].kind
    cls = getattr(diffusers, kind.pipelines[task])
    joined = networks[0]
    if len(controls) > 1 and kind.kind is not ControlKind.UNION:
        joined = getattr(diffusers, kind.several)(list(networks))
    pipeline = _over_modules(cls, resident, {kind.component: joined})
    if kind.draws_unseeded:
        vars(pipeline)["vae"] = MeanEncodingVae(pipeline.vae)
    # Pipelines that work on pixels blend pixels.
    if task is Task.INPAINTING and hasattr(pipeline, "unet"):
        vars(pipeline)["unet"] = denoiser_for_inpainting(pipeline)
    return pipeline


def _over_modules(cls: Any, resident: Any, more: Mapping[str, Any]) -> Any:
    """A pipeline of another class over the modules of one; `from_pipe` would cast them."""
    expected, optional = cls._get_signature_keys(cls)
    parts = {name: part for name, part in resident.components.items() if name in expected}
    # Constructors alter settings of the scheduler that they get, and say so: hence a copy.
    parts["scheduler"] = copy.deepcopy(resident.scheduler)
    config = {name: resident.config[name] for name in optional if name in resident.config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = cls(**parts, **config, **more)
    if hasattr(resident, "watermark"):
        pipeline.watermark = resident.watermark
    pipeline.set_progress_bar_config(**getattr(resident, "_progress_bar_config", {}))
    return pipeline


def _as_taken(network: Any, image: Image.Image) -> Image.Image:
    """T2I-Adapters for edges and sketches have one channel."""
    is_grey = type(network).__name__ == "T2IAdapter" and network.config.in_channels == 1
    return image.convert("L") if is_grey else image
