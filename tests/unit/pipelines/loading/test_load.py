from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stepserve.domain.models import SizeRange
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.capabilities import derive_sizes
from stepserve.pipelines.facts.signature import CallSignature
from stepserve.pipelines.loading.folders import LoadedModel, choose_device, load_model
from tiny_model import MAX_TOKENS, NATIVE_PX


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def write_manifest(folder: Path, **entries: object) -> None:
    (folder / "stepserve.json").write_text(json.dumps(entries))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model x: .*nowhere is not a diffusers folder"):
        load_model("x", tmp_path / "nowhere")


def test_an_unknown_dtype_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="dtype 'float8' is none of bfloat16, float16"):
        load_model("x", tiny_folder, dtype="float8")


def test_an_unknown_device_is_told(tiny_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="model x: cannot be loaded"):
        load_model("x", tiny_folder, device="toaster")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / "model_index.json").write_text("{"),
        lambda folder: shutil.rmtree(folder / "unet"),
        lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"cut"),
        lambda folder: (folder / "stepserve.json").write_text("[1, 2]"),
        lambda folder: write_manifest(folder, colour="red"),
        lambda folder: write_manifest(folder, sizes={"minimum": 8}),
        lambda folder: write_manifest(folder, default_scheduler="NoSuchScheduler"),
        lambda folder: write_manifest(folder, default_scheduler="EDMEulerScheduler"),
    ],
    ids=["index", "unet", "weights", "list", "unknown key", "sizes", "scheduler", "unsuitable"],
)
def test_whatever_is_wrong_with_a_folder_is_one_kind_of_error(
    copied: Path, break_it: object
) -> None:
    assert callable(break_it)
    break_it(copied)
    with pytest.raises(ModelLoadError, match="model x: cannot be loaded") as failed:
        load_model("x", copied, dtype="float32")
    assert str(pickle.loads(pickle.dumps(failed.value))) == str(failed.value)


def test_capabilities_are_derived_from_the_pipeline(tiny: LoadedModel) -> None:
    capabilities = tiny.capabilities
    assert capabilities.id == "tiny"
    assert capabilities.description == "tiny"
    assert capabilities.sizes == SizeRange(32, 2 * NATIVE_PX, 16, NATIVE_PX)
    assert capabilities.max_prompt_tokens == MAX_TOKENS
    assert capabilities.default_scheduler == "DDIMScheduler"
    assert capabilities.schedulers == tuple(tiny.schedulers)
    assert capabilities.created > 0


def test_a_manifest_wins_over_what_is_derived(copied: Path) -> None:
    sizes = {"minimum": 48, "maximum": 96, "step": 16, "native": 64}
    write_manifest(copied, sizes=sizes, max_n=2, default_scheduler="PNDMScheduler")
    capabilities = load_model("m", copied, dtype="float32").capabilities
    assert capabilities.sizes == SizeRange(48, 96, 16, 64)
    assert capabilities.max_n == 2
    assert capabilities.default_scheduler == "PNDMScheduler"
    assert capabilities.description == "StableDiffusionPipeline from copied"


@pytest.mark.parametrize(
    ("sample_size", "scale", "levels", "wanted"),
    [
        (8, 8, 2, SizeRange(32, 128, 16, 64)),
        (64, 8, 4, SizeRange(256, 1024, 64, 512)),
        (8, 8, 4, SizeRange(64, 128, 64, 64)),
        (32, 1, 1, SizeRange(16, 64, 1, 32)),
    ],
)
def test_sizes_are_steps_that_the_unet_can_halve(
    sample_size: int, scale: int, levels: int, wanted: SizeRange
) -> None:
    config = SimpleNamespace(block_out_channels=[8] * levels, sample_size=sample_size)
    pipeline = SimpleNamespace(unet=SimpleNamespace(config=config), vae_scale_factor=scale)
    sizes = derive_sizes(pipeline, CallSignature(frozenset({"prompt", "height"})))
    assert sizes == wanted
    assert sizes.minimum > 0
    assert sizes.accepts(sizes.native)
    assert sizes.accepts(sizes.maximum)


def test_modules_are_ready_to_serve(tiny: LoadedModel) -> None:
    pipeline = tiny.pipeline
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not module.training
    for module in (pipeline.unet, pipeline.vae):
        weight = next(p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
