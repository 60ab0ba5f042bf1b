"""Every kind of network, from a saved folder through the cache to what diffusers draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import controlled, controlled_transformers, flux, stable_diffusion_3
from families.catalogue import FAMILIES
from families.family import Family, Variation, first_output, resident, seeded
from families.unet_parts import XL_SETTINGS
from PIL import Image
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.requests import ControlUse
from stepserve.domain.tasks import Task
from stepserve.pipelines.controls.cache import ControlCache
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.controls.kinds import KINDS
from stepserve.pipelines.controls.mean_encoding import MeanEncodingVae
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.facts.signature import accepted_arguments
from torch import nn

VARIATION = Variation(0, 100, 2, 5.0)
# By name of a network: the base family, the network, the mode of a union network.
XL = {name: value for name, value in XL_SETTINGS.items() if name != "up_block_types"}
NETWORKS: dict[str, tuple[str, Any, str | int | None]] = {
    "sd": ("Stable Diffusion", controlled.tiny_controlnet, None),
    "sd-adapter": ("Stable Diffusion", controlled.tiny_adapter, None),
    "xl": ("Stable Diffusion XL", lambda: controlled.tiny_controlnet(**XL), None),
    "xl-union": ("Stable Diffusion XL", controlled.tiny_union, "canny"),
    "xl-adapter": ("Stable Diffusion XL", controlled.tiny_xl_adapter, None),
    "sd3": ("Stable Diffusion 3", stable_diffusion_3.controlnet, None),
    "flux": ("FLUX", flux.controlnet, None),
    "flux-union": ("FLUX", controlled_transformers.flux_union, 2),
    "qwen": ("Qwen-Image", controlled_transformers.qwen_controlnet, None),
    "hunyuan": ("Hunyuan-DiT", controlled_transformers.hunyuan_controlnet, None),
    "sana": ("Sana", controlled_transformers.sana_controlnet, None),
}
BASES: dict[str, Callable[[], Any]] = {"hunyuan": seeded(controlled_transformers.deep_hunyuan)}
# Requests of other tasks are drawn with the arguments of these families.
TASKS = {
    Task.IMAGE_TO_IMAGE: "{}, image to image",
    Task.INPAINTING: "{}, inpainting",
}
UNFIT = ("sd3", "qwen", "hunyuan", "sana", "sd-adapter", "xl-adapter")
CASES = [
    (name, task, count)
    for name in NETWORKS
    for task, count in [
        (Task.TEXT_TO_IMAGE, 1),
        (Task.TEXT_TO_IMAGE, 2),
        (Task.IMAGE_TO_IMAGE, 1),
        (Task.INPAINTING, 1),
    ]
    if not (count == 2 and name in ("qwen", "sana"))
    and not (task is not Task.TEXT_TO_IMAGE and name in UNFIT)
]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning"),
]


def built(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = NETWORKS[name][1]()
    return network


def control_image(seed: int, side: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Request:
    """A request with controls of one kind, over a resident pipeline of the base family."""

    def __init__(self, name: str, task: Task, count: int, folder: Path) -> None:
        base, _, mode = NETWORKS[name]
        self.task = task
        self.family: Family = FAMILIES[TASKS.get(task, "{}").format(base)]
        self.pipeline = BASES.get(name, partial(resident, FAMILIES[base]))()
        # A union network is one for several modes.
        seeds = [0] * count if mode is not None else list(range(count))
        for seed in set(seeds):
            network: Any = built(name, seed)
            network.save_pretrained(folder / f"{seed}")
        sources = [ControlSource(folder / f"{seed}", mode=mode) for seed in seeds]
        named = {f"control-{i}": source for i, source in enumerate(sources)}
        self.cache = ControlCache(self.pipeline, ControlOptions(named))
        arguments = self.family.arguments(self.pipeline, VARIATION)
        self.side = int(arguments.get("height") or arguments["image"].shape[-1])

    def draw(self, scales: list[float], seeds: list[int]) -> torch.Tensor:
        uses = [
            ControlUse(name, b"", scale)
            for name, scale in zip(self.cache.options.named, scales, strict=True)
        ]
        controls = self.cache.resolve(uses, self.task)
        images = [control_image(seed, self.side) for seed in seeds]
        return self.cache.run_with(controls, lambda: self._call(controls, uses, images))

    def _call(self, controls: Any, uses: Any, images: Any) -> torch.Tensor:
        steering = self.cache.steering(controls, self.task)
        assert steering is not None
        wanted = self.family.arguments(self.pipeline, VARIATION) | {"output_type": "np"}
        wanted |= steering.arguments(uses, images)
        copied = copy_pipeline(steering.pipeline)
        return first_output(copied(**accepted_arguments(steering.signature, wanted)))


@pytest.mark.parametrize(("name", "task", "count"), CASES)
def test_each_control_steers_by_its_image_and_its_scale(
    name: str, task: Task, count: int, tmp_path: Path
) -> None:
    request = Request(name, task, count, tmp_path)
    ones, seeds = [1.0] * count, list(range(count))
    drawn = request.draw(ones, seeds)
    assert drawn.isfinite().all()
    assert torch.equal(request.draw(ones, seeds), drawn)
    for index in range(count):
        other = request.draw(ones, [*seeds[:index], 9, *seeds[index + 1 :]])
        weaker = request.draw([*ones[:index], 0.3, *ones[index + 1 :]], seeds)
        assert (other - drawn).abs().max() > 1e-3, "its image does not matter"
        assert (weaker - drawn).abs().max() > 1e-3, "its scale does not matter"


# What they draw differs from call to call.
DRAWS_UNSEEDED = ("StableDiffusion3ControlNetPipeline", "HunyuanDiTControlNetPipeline")
ROUNDING = 1e-6
PLAIN = {
    "sd": "Stable Diffusion with a ControlNet",
    "sd-adapter": "Stable Diffusion with a T2I-Adapter",
    "xl": "Stable Diffusion XL with a ControlNet",
    "xl-union": "Stable Diffusion XL with a union ControlNet",
    "xl-adapter": "Stable Diffusion XL with a T2I-Adapter",
    "sd3": "Stable Diffusion 3 with a ControlNet",
    "flux": "FLUX with a ControlNet",
    "flux-union": "FLUX with a union ControlNet",
    "qwen": "Qwen-Image with a ControlNet",
    "hunyuan": "Hunyuan-DiT with a ControlNet",
    "sana": "Sana with a ControlNet",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_one_control_is_the_plain_pipelines(name: str, tmp_path: Path) -> None:
    """The class that a person would take, made the way that diffusers documents."""
    request = Request(name, Task.TEXT_TO_IMAGE, 1, tmp_path)
    drawn = request.draw([0.8], [0])
    cls: Any = type(resident(FAMILIES[PLAIN[name]]))
    adapter, mode = "adapter" in name, NETWORKS[name][2]
    parts = {"adapter" if adapter else "controlnet": built(name, 0).eval()}
    own = {
        k: v for k, v in request.pipeline.components.items() if k in cls._get_signature_keys(cls)[0]
    }
    pipeline = cls(**own, **parts)
    pipeline.set_progress_bar_config(disable=True)
    arguments = request.family.arguments(request.pipeline, VARIATION) | {"output_type": "np"}
    image = control_image(0, request.side)
    field = "image" if name in ("sd", "xl", "sd-adapter", "xl-adapter") else "control_image"
    arguments |= {field: [image] if name == "xl-union" else image}
    arguments |= {"adapter_conditioning_scale" if adapter else "controlnet_conditioning_scale": 0.8}
    if mode is not None:
        arguments["control_mode"] = [3] if name == "xl-union" else mode
    if cls.__name__ in DRAWS_UNSEEDED:
        pipeline.vae = MeanEncodingVae(pipeline.vae)
    wanted = first_output(copy_pipeline(pipeline)(**arguments))
    assert (wanted - drawn).abs().max() <= ROUNDING


def test_every_kind_is_tried() -> None:
    tried = {type(NETWORKS[name][1]()).__name__ for name in NETWORKS}
    assert {kind.network for kind in KINDS} == tried


@pytest.mark.parametrize(
    ("name", "task", "goes"),
    [
        ("sd", Task.INPAINTING, True),
        ("sd-adapter", Task.TEXT_TO_IMAGE, False),
        ("xl-adapter", Task.TEXT_TO_IMAGE, True),
        ("xl-union", Task.IMAGE_TO_IMAGE, True),
        ("sd3", Task.TEXT_TO_IMAGE, True),
        ("flux", Task.TEXT_TO_IMAGE, True),
        ("flux", Task.IMAGE_TO_IMAGE, False),
        ("flux", Task.INPAINTING, False),
    ],
)
def test_references_are_refused_where_no_pipeline_takes_them_beside_a_control(
    name: str, task: Task, goes: bool, tmp_path: Path
) -> None:
    cache, uses = Request(name, task, 1, tmp_path).cache, [ControlUse("control-0", b"")]
    if goes:
        assert cache.resolve(uses, task, with_references=True)
        return
    with pytest.raises(InvalidRequestError, match="cannot be combined with 'control-0'") as caught:
        cache.resolve(uses, task, with_references=True)
    assert caught.value.field == "references"
