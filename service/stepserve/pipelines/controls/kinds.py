"""The one table of networks that steer: over which pipelines, and by which classes of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stepserve.domain.models import ControlKind
from stepserve.domain.tasks import Task

OF_A_CONTROLNET = ("in_channels", "block_out_channels", "cross_attention_dim")
OF_A_TRANSFORMER = (
    "in_channels",
    "joint_attention_dim",
    "num_attention_heads",
    "attention_head_dim",
    "caption_channels",
    "hidden_size",
)


@dataclass(frozen=True)
class NetworkKind:
    """Networks of one class over pipelines of one family.

    Args:
        network: name of the class, as in the network's `config.json`.
        base: a pattern of the classes of pipelines that it steers.
        pipelines: by task, name of the class that calls it.
        several: name of the class that joins several; empty: a request takes one.
        settings: of the network, which are the denoiser's too if it was made for it.
        kind: what requests are told.
        draws_unseeded: whether the pipelines encode control images without the request's generator.
    """

    network: str
    base: str
    pipelines: Mapping[Task, str]
    several: str = ""
    settings: tuple[str, ...] = OF_A_TRANSFORMER
    kind: ControlKind = ControlKind.CONTROLNET
    draws_unseeded: bool = False

    @property
    def component(self) -> str:
        """What the pipelines call the network."""
        return "adapter" if self.kind is ControlKind.T2I_ADAPTER else "controlnet"

    @property
    def takes_interval(self) -> bool:
        """Whether the pipelines can leave it out at some steps."""
        return self.kind is not ControlKind.T2I_ADAPTER and self.network not in AT_EVERY_STEP


AT_EVERY_STEP = ("HunyuanDiT2DControlNetModel", "SanaControlNetModel")


def _tasks(*names: str) -> dict[Task, str]:
    tasks = (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINTING)
    return {task: name for task, name in zip(tasks, names, strict=False) if name}


SD = r"StableDiffusion(Img2Img|Inpaint)?Pipeline"
XL = r"StableDiffusionXL(Img2Img|Inpaint)?Pipeline"
KINDS = (
    NetworkKind(
        "ControlNetModel",
        SD,
        _tasks(
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
        ),
        "MultiControlNetModel",
        OF_A_CONTROLNET,
    ),
    NetworkKind(
        "ControlNetModel",
        XL,
        _tasks(
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
        ),
        "MultiControlNetModel",
        OF_A_CONTROLNET,
    ),
    NetworkKind(
        "ControlNetUnionModel",
        XL,
        _tasks(
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
        ),
        settings=OF_A_CONTROLNET,
        kind=ControlKind.UNION,
    ),
    NetworkKind(
        "T2IAdapter",
        SD,
        _tasks("StableDiffusionAdapterPipeline"),
        "MultiAdapter",
        (),
        ControlKind.T2I_ADAPTER,
    ),
    NetworkKind(
        "T2IAdapter",
        XL,
        _tasks("StableDiffusionXLAdapterPipeline"),
        "MultiAdapter",
        (),
        ControlKind.T2I_ADAPTER,
    ),
    NetworkKind(
        "SD3ControlNetModel",
        r"StableDiffusion3(Img2Img|Inpaint)?Pipeline",
        _tasks("StableDiffusion3ControlNetPipeline"),
        "SD3MultiControlNetModel",
        draws_unseeded=True,
    ),
    NetworkKind(
        "FluxControlNetModel",
        r"Flux(Img2Img|Inpaint)?Pipeline",
        _tasks(
            "FluxControlNetPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        ),
        "FluxMultiControlNetModel",
    ),
    NetworkKind(
        "QwenImageControlNetModel",
        r"QwenImage(Img2Img|Inpaint)?Pipeline",
        _tasks("QwenImageControlNetPipeline"),
    ),
    NetworkKind(
        "HunyuanDiT2DControlNetModel",
        r"HunyuanDiTPipeline",
        _tasks("HunyuanDiTControlNetPipeline"),
        "HunyuanDiT2DMultiControlNetModel",
        draws_unseeded=True,
    ),
    NetworkKind("SanaControlNetModel", r"SanaPipeline", _tasks("SanaControlNetPipeline")),
)


def kinds_over(pipeline: Any) -> Iterator[NetworkKind]:
    """The networks that can steer a pipeline."""
    name = type(pipeline).__name__
    return (kind for kind in KINDS if re.fullmatch(kind.base, name))
