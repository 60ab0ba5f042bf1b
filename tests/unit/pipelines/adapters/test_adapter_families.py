"""The adapter cache knows no family of pipelines: diffusers' own loaders do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.requests import AdapterUse
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import hush_libraries

SCALE = 0.5


@dataclass
class Denoiser:
    """A pipeline that has nothing but its denoiser, and what to call that with."""

    pipeline: Any
    component: str
    arguments: dict[str, Any]

    @property
    def module(self) -> Any:
        return getattr(self.pipeline, self.component)

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = self.module(**self.arguments, return_dict=False)[0]
        return output


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def flux() -> Denoiser:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    arguments = {
        "hidden_states": normal(2, 16, 4),
        "encoder_hidden_states": normal(2, 8, 32),
        "pooled_projections": normal(2, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    pipeline = FluxPipeline(scheduler, None, None, None, None, None, transformer)
    return Denoiser(pipeline, "transformer", arguments)


def sd3() -> Denoiser:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    arguments = {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 8, 32),
        "pooled_projections": normal(2, 64),
        "timestep": torch.tensor([5, 5]),
    }
    pipeline = StableDiffusion3Pipeline(transformer, scheduler, *[None] * 7)
    return Denoiser(pipeline, "transformer", arguments)


def sdxl() -> Denoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    arguments = {
        "sample": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 8, 16),
        "timestep": 5,
        "added_cond_kwargs": {"text_embeds": normal(2, 32), "time_ids": torch.ones(2, 6)},
    }
    pipeline = StableDiffusionXLPipeline(*[None] * 5, unet, EulerDiscreteScheduler())
    return Denoiser(pipeline, "unet", arguments)


def save_adapter(denoiser: Denoiser, folder: Path) -> Path:
    module, component = denoiser.module, denoiser.component
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False
    )
    module.add_adapter(config)
    type(denoiser.pipeline).save_lora_weights(
        folder,
        weight_name="a.safetensors",
        **{f"{component}_lora_layers": get_peft_model_state_dict(module)},
        **_collate_lora_metadata({component: module}),
    )
    return folder / "a.safetensors"


def plain_forward(denoiser: Denoiser, file: Path) -> torch.Tensor:
    denoiser.pipeline.load_lora_weights(
        str(file.parent), weight_name=file.name, adapter_name="plain"
    )
    denoiser.pipeline.set_adapters(["plain"], [SCALE])
    return denoiser.forward()


def cached_adapter_forwards(denoiser: Denoiser, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """With the adapter, and set to none while it is loaded."""
    adapter_cache = AdapterCache(denoiser.pipeline, AdapterOptions(folder=file.parent))
    variant = adapter_cache.resolve([AdapterUse(file.stem, SCALE)])

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = []
        for wanted in (variant, None):
            adapter_cache.enter()[denoiser.component]([(wanted, 2)])
            outputs.append(denoiser.forward())
        return outputs[0], outputs[1]

    try:
        return adapter_cache.run_with(variant, run)
    finally:
        adapter_cache.close()


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hush_libraries()


@pytest.mark.parametrize("family", [flux, sd3, sdxl])
def test_a_family_is_as_plain_diffusers_has_it(
    family: Callable[[], Denoiser], tmp_path: Path
) -> None:
    file = save_adapter(family(), tmp_path)
    bare, wanted = family().forward(), plain_forward(family(), file)
    with_adapter, without = cached_adapter_forwards(family(), file)
    assert not torch.equal(bare, wanted)
    assert torch.equal(with_adapter, wanted)
    assert torch.equal(without, bare)


def test_files_of_kohyas_trainer_are_read(tmp_path: Path) -> None:
    file = save_adapter(sdxl(), tmp_path)
    wanted = plain_forward(sdxl(), file)
    tensors = {}
    for name, tensor in load_file(file).items():
        layer, factor = name.removeprefix("unet.").removesuffix(".weight").split(".lora_")
        prefix = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{prefix}.lora_{'down' if factor == 'A' else 'up'}.weight"] = tensor
        tensors[f"{prefix}.alpha"] = torch.tensor(4.0)
    kohya = tmp_path / "kohya.safetensors"
    save_file(tensors, kohya)
    assert torch.equal(cached_adapter_forwards(sdxl(), kohya)[0], wanted)


def test_an_adapter_that_diffusers_would_make_room_for_in_the_model_is_refused(
    tmp_path: Path,
) -> None:
    """Flux control adapters widen the first layer of the transformer, for everybody."""
    file = save_adapter(flux(), tmp_path)
    wide = {
        "transformer.x_embedder.lora_A.weight": torch.zeros(2, 8),
        "transformer.x_embedder.lora_B.weight": torch.zeros(32, 2),
    }
    save_file(load_file(file) | wide, file)
    denoiser = flux()
    before = denoiser.forward()
    with pytest.raises(InvalidRequestError, match=r"x_embedder.* is for 8 features"):
        cached_adapter_forwards(denoiser, file)
    assert torch.equal(denoiser.forward(), before)
    denoiser.pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert denoiser.module.x_embedder.in_features == 8, "the danger that this test is about"
