"""Which files are loaded as IP-Adapters, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ip_adapter_weights import (
    flux_weights,
    save_adapter,
    sd3_weights,
    tiny_image_encoder,
    tiny_siglip,
    unet_plus_weights,
    unet_weights,
)
from safetensors.torch import load_file, save_file
from stepserve.composition import find_ip_adapters
from stepserve.config import ConfigError, ModelSettings, SpeedSettings, load_settings
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.trust import Trust
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.references.files import IpAdapterFiles
from tiny_families import save_tiny_dit, save_tiny_flux, save_tiny_sd3
from tiny_model import tiny_unet

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ip-adapter")
    return save_adapter(folder, unet_weights(tiny_unet()), tiny_image_encoder())


def files_in(folder: Path, name: str = "style") -> IpAdapterFiles:
    return IpAdapterFiles(name, folder / "ip-adapter.safetensors", folder / "image_encoder")


def load(folder: Path, *adapters: IpAdapterFiles, **options: Any) -> LoadedModel:
    return load_model("tiny", folder, "float32", "cpu", ip_adapters=adapters, **options)


def refusal(folder: Path, *adapters: IpAdapterFiles, **options: Any) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        load(folder, *adapters, **options)
    return caught.value


def changed(folder: Path, tmp_path: Path, change: Callable[[Weights], Weights]) -> IpAdapterFiles:
    """An adapter with other tensors."""
    tensors = load_file(folder / "ip-adapter.safetensors")
    save_file(change(tensors), tmp_path / "ip-adapter.safetensors")
    return replace(files_in(folder), weights=tmp_path / "ip-adapter.safetensors")


def test_an_adapter_is_loaded_with_its_image_encoder(
    tiny_folder: Path, adapter_folder: Path
) -> None:
    model = load(tiny_folder, files_in(adapter_folder))
    assert model.references is not None
    assert model.references.names == ("style",)
    assert model.pipeline.image_encoder.dtype == torch.float32
    assert not model.pipeline.image_encoder.training
    plain = load(tiny_folder)
    assert plain.references is None
    assert plain.capabilities.fingerprint != model.capabilities.fingerprint


def test_two_adapters_are_loaded_at_once(
    tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    plus = save_adapter(tmp_path, unet_plus_weights(tiny_unet()), tiny_image_encoder())
    model = load(tiny_folder, files_in(adapter_folder), files_in(plus, "detail"))
    assert model.references is not None
    assert model.references.names == ("style", "detail")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_an_adapter_is_in_the_dtype_of_the_model(tmp_path: Path, dtype: str) -> None:
    flux = save_tiny_flux(tmp_path / "flux")
    denoiser = load_model("flux", flux, "float32", "cpu").pipeline.transformer
    adapter = save_adapter(tmp_path / "adapter", flux_weights(denoiser), tiny_image_encoder())
    model = load_model("flux", flux, dtype, "cpu", ip_adapters=[files_in(adapter)])
    dtypes = {weight.dtype for weight in model.pipeline.transformer.parameters()}
    assert dtypes == {getattr(torch, dtype)}


def test_pickle_files_are_read_where_they_are_allowed_only(
    tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    parts: dict[str, Weights] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(adapter_folder / "ip-adapter.safetensors").items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    torch.save(parts, tmp_path / "ip-adapter.bin")
    files = replace(files_in(adapter_folder), weights=tmp_path / "ip-adapter.bin")
    assert "allow_pickle: true" in refusal(tiny_folder, files).message
    assert load(tiny_folder, files, trust=Trust(pickle=True)).references is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {"lora.up.weight": torch.ones(1)}, "it holds no IP-Adapter"),
        (
            lambda tensors: tensors | {"ip_adapter.1.to_q_lora.up.weight": torch.ones(1)},
            "embeddings of faces",
        ),
        (
            lambda tensors: tensors | {"ip_adapter.99.to_k_ip.weight": torch.ones(1)},
            "5 attention layers, and the denoiser has 4",
        ),
        (
            lambda tensors: (
                {name: w.repeat(1, 2) for name, w in tensors.items() if w.dim() == 2}
                | {name: w for name, w in tensors.items() if w.dim() == 1}
            ),
            "cannot be loaded into a StableDiffusionPipeline",
        ),
        (
            lambda tensors: {n: w for n, w in tensors.items() if n != "image_proj.norm.bias"},
            "norm.bias",
        ),
    ],
)
def test_other_files_are_refused_with_what_is_wrong(
    tiny_folder: Path,
    adapter_folder: Path,
    tmp_path: Path,
    change: Callable[[Weights], Weights],
    said: str,
) -> None:
    error = refusal(tiny_folder, changed(adapter_folder, tmp_path, change))
    assert said in error.message
    assert str(tmp_path) not in error.reason


def test_a_file_that_is_cut_short_is_refused(
    tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    whole = (adapter_folder / "ip-adapter.safetensors").read_bytes()
    cut = tmp_path / "ip-adapter.safetensors"
    cut.write_bytes(whole[:100])
    error = refusal(tiny_folder, replace(files_in(adapter_folder), weights=cut))
    assert "not a whole safetensors file" in error.message


def test_an_image_encoder_must_be_there_and_fit(
    tiny_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    files = files_in(adapter_folder)
    nowhere = replace(files, image_encoder=tmp_path)
    assert "set image_encoder_path" in refusal(tiny_folder, nowhere).message
    other = tiny_image_encoder(projection_dim=8)
    other.save_pretrained(tmp_path / "other")
    error = refusal(tiny_folder, replace(files, image_encoder=tmp_path / "other"))
    assert "made for another image encoder" in error.message


def test_stable_diffusion_3_takes_one(tmp_path: Path) -> None:
    sd3 = save_tiny_sd3(tmp_path / "sd3")
    denoiser = load(sd3).pipeline.transformer
    adapter = save_adapter(tmp_path / "adapter", sd3_weights(denoiser), tiny_siglip())
    model = load(sd3, files_in(adapter))
    assert model.references is not None
    assert model.references.max_images == 1
    error = refusal(sd3, files_in(adapter), files_in(adapter, "face"))
    assert "takes one IP-Adapter, and 2 are listed (style, face)" in error.message


@pytest.mark.parametrize("kind", ["text and image in one", "class labels"])
def test_other_models_take_none(kind: str, adapter_folder: Path, tmp_path: Path) -> None:
    folder = EMBEDDED if kind == "text and image in one" else save_tiny_dit(tmp_path / "dit")
    error = refusal(folder, files_in(adapter_folder))
    assert "takes none; pipelines with the denoisers of Stable Diffusion" in error.message


def test_quantization_is_refused(tiny_folder: Path, adapter_folder: Path) -> None:
    speed = SpeedSettings(quantization="int8")
    with pytest.raises(ModelLoadError, match=r"quantization"):
        load_model("tiny", tiny_folder, speed=speed, ip_adapters=[files_in(adapter_folder)])


def found(**settings: Any) -> IpAdapterFiles:
    """Where the files of one adapter are looked for."""
    (files,) = find_ip_adapters(ModelSettings.model_validate({"ip_adapters": {"style": settings}}))
    return files


def test_files_are_found_as_diffusers_finds_them(adapter_folder: Path) -> None:
    weights = adapter_folder / "ip-adapter.safetensors"
    encoder = adapter_folder / "image_encoder"
    parent, name = str(adapter_folder.parent), adapter_folder.name
    expected = IpAdapterFiles("style", weights, encoder)
    assert found(path=str(adapter_folder)) == expected
    assert found(path=str(weights)) == expected
    assert found(path=parent, subfolder=name) == expected
    assert found(path=parent, subfolder=name, weight_name=weights.name) == expected
    slashed = found(path=parent, subfolder=name, image_encoder_folder="models/image_encoder")
    assert slashed.image_encoder == adapter_folder.parent / "models" / "image_encoder"
    elsewhere = found(path=str(weights), image_encoder_path="/models/clip")
    assert elsewhere.image_encoder == Path("/models/clip")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "h94/IP-Adapter", "revision": "main", "weight_name": "a"}, "style.revision"),
        ({"path": "h94/IP-Adapter", "revision": "0" * 40}, "weight_name must be set"),
        ({"path": "/models/ip", "revision": "0" * 40, "weight_name": "a"}, "a hub id such as"),
        ({"path": "/models/ip", "image_encoder_revision": "0" * 40}, "in image_encoder_path: None"),
        ({"path": "/models/ip", "wait_name": "a"}, "unknown key"),
        ({}, "style.path"),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    file = tmp_path / "stepserve.yaml"
    models = {"sd": {"path": "/models/sd", "ip_adapters": {"style": settings}}}
    file.write_text(yaml.safe_dump({"models": models}))
    with pytest.raises(ConfigError) as caught:
        load_settings(file, {})
    assert said in str(caught.value)


def test_a_name_of_weights_that_is_missing_or_needed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"ip_adapters\.style: its folder holds no file a\.s"):
        found(path=str(tmp_path), weight_name="a.safetensors")
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelLoadError, match=r"holds 2 \.safetensors files; set weight_name"):
        found(path=str(tmp_path))
