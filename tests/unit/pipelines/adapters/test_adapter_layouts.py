"""Every layer of an adapter is what its file says, compared with weights merged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_writers import (
    ATTENTION,
    TEXT,
    Alpha,
    Factors,
    alpha_of_its_own,
    difference_by_hand,
    diffusers_saved,
    kohya,
    layers_of,
    make_factors,
    peft_saved,
)
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.requests import AdapterUse
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import hush_libraries
from test_adapter_families import sdxl as sdxl_denoiser
from tiny_adapters import load_plain
from tiny_families import save_tiny_flux
from tiny_model import tiny_clip_tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BOUND = 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hush_libraries()


@pytest.fixture
def sd(tiny_folder: Path) -> Any:
    return load_plain(tiny_folder)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def flux(flux_folder: Path) -> Any:
    return FluxPipeline.from_pretrained(flux_folder, local_files_only=True)


@pytest.fixture
def sdxl() -> Any:
    torch.manual_seed(0)
    tokenizer = tiny_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    encoders = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    unet = sdxl_denoiser().module
    scheduler = EulerDiscreteScheduler()
    return StableDiffusionXLPipeline(None, *encoders, tokenizer, tokenizer, unet, scheduler)


def parts_of(pipeline: Any, ends: tuple[str, ...] = ATTENTION) -> dict[str, Factors]:
    names = [n for n in pipeline._lora_loadable_modules if hasattr(pipeline, n)]
    return {
        name: make_factors(getattr(pipeline, name), TEXT if name.startswith("text") else ends, seed)
        for seed, name in enumerate(names)
    }


def with_loaded(pipeline: Any, path: Path, look: Callable[[str], Any]) -> Any:
    """What `look` sees, by PEFT's name of the adapter, while it is loaded and applied."""
    adapter_cache = AdapterCache(pipeline, AdapterOptions(named={"a": path}))
    variant = adapter_cache.resolve([AdapterUse("a", 1.0)])

    def run() -> Any:
        for enter in adapter_cache.enter().values():
            enter([(variant, 1)])
        return look(next(iter(adapter_cache._loaded.values())))

    try:
        return adapter_cache.run_with(variant, run)
    finally:
        adapter_cache.close()


def loaded_differences(pipeline: Any, path: Path) -> dict[str, Tensor]:
    """What the adapter adds to each layer, by component and path."""

    def look(name: str) -> dict[str, Tensor]:
        return {
            f"{component}.{place}": layer.get_delta_weight(name)
            for component in pipeline._lora_loadable_modules
            for place, layer in getattr(pipeline, component).named_modules()
            if isinstance(layer, BaseTunerLayer) and name in layer.scaling
        }

    seen: dict[str, Tensor] = with_loaded(pipeline, path, look)
    return seen


def by_hand(parts: Mapping[str, Factors], alpha: Alpha) -> dict[str, Tensor]:
    return {
        f"{component}.{path}": difference_by_hand(pair, alpha(path, pair[0].shape[0]))
        for component, factors in parts.items()
        for path, pair in factors.items()
    }


def assert_same(seen: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for path, difference in wanted.items():
        assert (seen[path] - difference).abs().max() < BOUND * difference.abs().max(), path


def write(tensors: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def refusal(pipeline: Any, path: Path) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        with_loaded(pipeline, path, lambda name: None)
    assert str(path.parent) not in caught.value.message
    return caught.value.message


def rank_as_alpha(path: str, rank: int) -> float:
    return float(rank)


@pytest.mark.parametrize("ends", [ATTENTION, (*ATTENTION, "conv1", "conv2", "proj_in")])
def test_kohyas_layers_have_the_alpha_of_their_own(
    sd: Any, tmp_path: Path, ends: tuple[str, ...]
) -> None:
    parts = parts_of(sd, ends)
    file = write(kohya(parts), tmp_path / "a.safetensors")
    assert_same(loaded_differences(sd, file), by_hand(parts, alpha_of_its_own))


@pytest.mark.parametrize("sgm", [False, True])
def test_both_text_encoders_and_the_blocks_of_sdxl_do(sdxl: Any, tmp_path: Path, sgm: bool) -> None:
    parts = parts_of(sdxl)
    file = write(kohya(parts, sgm=sgm), tmp_path / "a.safetensors")
    assert_same(loaded_differences(sdxl, file), by_hand(parts, alpha_of_its_own))


def test_any_scale_is_of_that_alpha(sd: Any, tmp_path: Path) -> None:
    """PEFT works a scale out anew, of what it was told of the layer."""
    parts = parts_of(sd)
    file = write(kohya(parts), tmp_path / "a.safetensors")
    adapter_cache = AdapterCache(sd, AdapterOptions(named={"a": file}))
    variant = adapter_cache.resolve([AdapterUse("a", 0.5)])

    def run() -> dict[str, float]:
        adapter_cache.enter()["unet"]([(variant, 2)])
        name = next(iter(adapter_cache._loaded.values()))
        return {p: sd.unet.get_submodule(p).scaling[name] for p in parts["unet"]}

    scalings = adapter_cache.run_with(variant, run)
    adapter_cache.close()
    for path, (first, _) in parts["unet"].items():
        rank = first.shape[0]
        assert scalings[path] == pytest.approx(0.5 * alpha_of_its_own(path, rank) / rank)


def test_without_alphas_each_is_its_rank(sd: Any, tmp_path: Path) -> None:
    parts = parts_of(sd)
    file = write(kohya(parts, alpha=None), tmp_path / "a.safetensors")
    assert_same(loaded_differences(sd, file), by_hand(parts, rank_as_alpha))


@pytest.mark.parametrize("end", ["q_proj", "fc1", "out_proj"])
@pytest.mark.parametrize("is_kohyas", [False, True])
def test_a_text_encoder_may_be_trained_in_part(
    sd: Any, tmp_path: Path, end: str, is_kohyas: bool
) -> None:
    parts = {"text_encoder": make_factors(sd.text_encoder, (end,))}
    tensors = kohya(parts) if is_kohyas else diffusers_saved(parts)
    seen = loaded_differences(sd, write(tensors, tmp_path / "a.safetensors"))
    assert_same(seen, by_hand(parts, alpha_of_its_own if is_kohyas else rank_as_alpha))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pefts_own_layout_is_read_with_its_settings(
    sd: Any, tmp_path: Path, component: str
) -> None:
    factors = make_factors(getattr(sd, component), ("to_q", "q_proj"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(peft_saved(factors), folder / "adapter_model.safetensors")
    some = next(iter(factors))
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "alpha_pattern": {some: 5}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))

    def alpha(path: str, rank: int) -> float:
        return 5 if path == some else 3

    assert_same(loaded_differences(sd, folder), by_hand({component: factors}, alpha))


def test_a_folder_that_peft_saved_is_an_adapter_among_others(sd: Any, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    folder.mkdir()
    write(peft_saved(make_factors(sd.unet, ("to_q",))), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    write(kohya(parts_of(sd)), tmp_path / "other.safetensors")
    assert AdapterOptions(folder=tmp_path).names() == ("drawn", "other")


def test_pefts_layout_without_its_settings_is_refused(sd: Any, tmp_path: Path) -> None:
    file = write(peft_saved(make_factors(sd.unet, ("to_q",))), tmp_path / "a.safetensors")
    assert "in PEFT's own layout (base_model.model.*), whose alpha is in adapter_config.json" in (
        refusal(sd, file)
    )


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_bare_paths_are_those_of_the_denoiser(flux: Any, tmp_path: Path, prefix: str) -> None:
    factors = make_factors(flux.transformer, ("to_q", "proj_mlp", "ff.net.2", "proj_out"))
    tensors = dict[str, Tensor]()
    for path, (first, second) in factors.items():
        tensors[f"{prefix}{path}.lora_down.weight"] = first
        tensors[f"{prefix}{path}.lora_up.weight"] = second
        tensors[f"{prefix}{path}.alpha"] = torch.tensor(alpha_of_its_own(path, 0))
    seen = loaded_differences(flux, write(tensors, tmp_path / "a.safetensors"))
    assert_same(seen, by_hand({"transformer": factors}, alpha_of_its_own))


def test_of_bare_paths_the_one_that_is_wrong_is_told(flux: Any, tmp_path: Path) -> None:
    factors = make_factors(flux.transformer, ("to_q",))
    factors["transformer_blocks.0.attn.to_zz"] = next(iter(factors.values()))
    tensors = dict[str, Tensor]()
    for path, (first, second) in factors.items():
        tensors[f"{path}.lora_A.weight"] = first.clone()
        tensors[f"{path}.lora_B.weight"] = second.clone()
    message = refusal(flux, write(tensors, tmp_path / "a.safetensors"))
    assert "no layer for transformer.transformer_blocks.0.attn.to_zz" in message


def test_flux_of_diffusers_and_of_kohya(flux: Any, tmp_path: Path) -> None:
    parts = parts_of(flux)
    seen = loaded_differences(flux, write(diffusers_saved(parts), tmp_path / "a.safetensors"))
    assert_same(seen, by_hand(parts, rank_as_alpha))
    # Kohya's layer is three of diffusers' layers.
    width, rank, alpha = flux.transformer.inner_dim, 4, 3.0
    first, second = torch.randn(rank, width), torch.randn(3 * width, rank)
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{key}.lora_down.weight": first,
        f"{key}.lora_up.weight": second,
        f"{key}.alpha": torch.tensor(alpha),
    }
    seen = loaded_differences(flux, write(tensors, tmp_path / "b.safetensors"))
    block = "transformer.transformer_blocks.0.attn"
    rows = difference_by_hand((first, second), alpha).chunk(3)
    names = [f"{block}.to_{side}" for side in "qkv"]
    assert_same(seen, dict(zip(names, rows, strict=True)))


@pytest.mark.parametrize("is_low_rank", [False, True])
def test_lokr_is_read_where_diffusers_reads_it(tmp_path: Path, is_low_rank: bool) -> None:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    tensors, wanted = dict[str, Tensor](), dict[str, Tensor]()
    for path in layers_of(transformer, "attention.to_q"):
        first, second = torch.randn(4, 4), (torch.randn(8, 2), torch.randn(2, 8))
        tensors[f"{path}.lokr_w1"] = first
        tensors[f"{path}.alpha"] = torch.tensor(3.0)
        product = second[0] @ second[1]
        if is_low_rank:
            tensors |= {f"{path}.lokr_w2_{s}": t for s, t in zip("ab", second, strict=True)}
        else:
            tensors[f"{path}.lokr_w2"] = product
        # LyCORIS has no use for alpha where both factors are whole.
        wanted[f"transformer.{path}"] = torch.kron(first, product) * (1.5 if is_low_rank else 1)
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    seen = loaded_differences(pipeline, write(tensors, tmp_path / "a.safetensors"))
    assert_same(seen, wanted)


def test_what_a_converter_loses_is_told(
    sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(sd)
    tensors = kohya(parts)
    read = sd.lora_state_dict

    def lossy(*args: Any, **kwargs: Any) -> Any:
        tensors, *others = read(*args, **kwargs)
        lost = next(n for n in tensors if "to_k" in n).split(".to_k")[0]
        return ({n: t for n, t in tensors.items() if not n.startswith(lost)}, *others)

    monkeypatch.setattr(sd, "lora_state_dict", lossy)
    message = refusal(sd, write(tensors, tmp_path / "a.safetensors"))
    assert "diffusers does not read 'lora_unet_" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_refused_with_their_tensor(
    sd: Any, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = {name: t.to(dtype) for name, t in kohya(parts_of(sd)).items()}
    name = [n for n in tensors if "lora_up" in n][5]
    tensors[name][0, 0] = value
    message = refusal(sd, write(tensors, tmp_path / "a.safetensors"))
    assert f"its tensor {name!r} holds numbers that are NaN or infinite" in message


def test_numbers_too_large_for_the_models_dtype_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    half = load_plain(tiny_folder, torch.float16)
    parts = parts_of(half)
    tensors = kohya(parts)
    name = next(n for n in tensors if "lora_up" in n and "unet" in n)
    tensors[name][0, 0] = 1e6
    message = refusal(half, write(tensors, tmp_path / "a.safetensors"))
    assert "the lora_B.weight of the layer unet." in message
    assert "is too large for torch.float16" in message


@pytest.mark.parametrize("name", ["lora_te_text_model_encoder_layers_7_mlp_fc1", "lora_unet_x_y"])
def test_a_layer_that_the_model_lacks_is_refused_by_name(
    sd: Any, tmp_path: Path, name: str
) -> None:
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16)}
    tensors[f"{name}.lora_up.weight"] = torch.ones(16, 2)
    file = write(kohya(parts_of(sd)) | tensors, tmp_path / "a.safetensors")
    assert "the model has no layer for " in refusal(sd, file)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_mid.dora_scale", "a DoRA adapter"),
        ("lora_unet_mid.hada_w1_a", "a LoHa adapter (LyCORIS)"),
        ("lora_unet_mid.lora_mid.weight", "a LoCon adapter with core tensors"),
        ("lora_unet_mid.oft_blocks", "an OFT adapter"),
        ("lora_unet_mid.on_input", "an (IA)3 adapter"),
        ("lora_unet_mid.diff", "whole differences of weights (LyCORIS)"),
        ("lora_unet_mid.lokr_w1", "a LoKr adapter (LyCORIS)"),
        ("emb_params", "a textual inversion embedding"),
        ("clip_g", "a textual inversion embedding"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("control_model.x.weight", "a ControlNet"),
        ("model.diffusion_model.x.weight", "a whole checkpoint"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_their_kind(
    sd: Any, tmp_path: Path, tensor: str, kind: str
) -> None:
    tensors = kohya(parts_of(sd)) | {tensor: torch.ones(2, 2)}
    message = refusal(sd, write(tensors, tmp_path / "a.safetensors"))
    assert f"cannot be used: it is {kind}" in message
    assert "convert it to a LoRA, or merge it into the model's weights" in message


def test_dora_that_diffusers_saved_is_as_plain_diffusers_has_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    trained = load_plain(tiny_folder)
    torch.manual_seed(1)
    trained.unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(ATTENTION),
            init_lora_weights=False,
            use_dora=True,
        )
    )
    with torch.no_grad():
        for name, weight in trained.unet.named_parameters():
            weight.mul_(1.3 if "magnitude" in name else 1)
    trained.save_lora_weights(
        tmp_path,
        weight_name="a.safetensors",
        unet_lora_layers=get_peft_model_state_dict(trained.unet),
        **_collate_lora_metadata({"unet": trained.unet}),
    )
    arguments = {"sample": torch.randn(1, 4, 8, 8), "timestep": 5}
    arguments["encoder_hidden_states"] = torch.randn(1, 4, 16)

    def draw(pipeline: Any) -> Tensor:
        with torch.no_grad():
            drawn: Tensor = pipeline.unet(**arguments).sample
        return drawn

    served = load_plain(tiny_folder)
    before = draw(served)
    drawn = with_loaded(served, tmp_path / "a.safetensors", lambda name: draw(served))
    assert torch.equal(drawn, draw(trained))
    assert not torch.equal(drawn, before)
    assert torch.equal(draw(served), before)
