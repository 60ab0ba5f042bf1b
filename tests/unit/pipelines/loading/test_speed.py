"""Each knob does what it says to the modules, or is refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from engine_fakes import make_parkable
from stepserve.config import ATTENTION_BACKENDS, SpeedSettings
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading import speed
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from tiny_families import save_tiny_flux
from tiny_model import a_request


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def backend_as_before() -> Iterator[None]:
    """Diffusers also keeps the attention backend for the whole process."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def load(folder: Path, **knobs: Any) -> LoadedModel:
    return load_model("m", folder, "float32", "cpu", SpeedSettings(**knobs))


def in_channels_last(module: torch.nn.Module) -> bool:
    weight = next(p for p in module.parameters() if p.dim() == 4 and min(p.shape[:2]) > 1)
    return weight.is_contiguous(memory_format=torch.channels_last)


def an_image(model: LoadedModel) -> bytes:
    request = a_request()
    with torch.no_grad():
        return (
            model.factory.copy(request.scheduler)(
                prompt=request.prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=2,
                generator=torch.Generator("cpu").manual_seed(request.seed),
            )
            .images[0]
            .tobytes()
        )


@pytest.mark.parametrize(("wanted", "found"), [(None, True), (True, True), (False, False)])
def test_channels_last(tiny_folder: Path, wanted: bool | None, found: bool) -> None:
    pipeline = load(tiny_folder, channels_last=wanted).pipeline
    assert in_channels_last(pipeline.unet) is found
    assert in_channels_last(pipeline.vae) is found


def test_modules_with_convolutions_of_videos_are_left_alone() -> None:
    """Torch raises for them; some models for images have such a VAE."""
    still, moving = torch.nn.Conv2d(2, 2, 3), torch.nn.Conv3d(2, 2, 3)

    class Pipeline:
        components: ClassVar = {
            "vae": torch.nn.Sequential(still, moving),
            "unet": torch.nn.Conv2d(2, 2, 3),
        }
        vae, unet = components["vae"], components["unet"]

    assert list(speed._modules_for_channels_last(Pipeline(), None)) == [Pipeline.unet]
    assert list(speed._modules_for_channels_last(Pipeline(), True)) == [Pipeline.unet]


@pytest.mark.usefixtures("backend_as_before")
def test_an_attention_backend_reaches_the_transformer(flux_folder: Path) -> None:
    transformer = load(flux_folder, attention_backend="_native_math").pipeline.transformer
    processors = [block.attn.processor for block in transformer.transformer_blocks]
    assert [p._attention_backend for p in processors] == [AttentionBackendName._NATIVE_MATH]


def test_a_unet_has_no_choice_of_attention(tiny_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="UNet2DConditionModel always computes attention"):
        load(tiny_folder, attention_backend="native")


@pytest.mark.usefixtures("backend_as_before")
def test_a_backend_whose_package_is_missing_is_refused(flux_folder: Path) -> None:
    assert find_spec("xformers") is None
    with pytest.raises(ModelLoadError, match="xformers"):
        load(flux_folder, attention_backend="xformers")


def test_known_backends_are_those_of_diffusers_that_download_nothing() -> None:
    names = {backend.value for backend in AttentionBackendName}
    assert set(ATTENTION_BACKENDS) == {name for name in names if not name.endswith("_hub")}


def test_slicing_and_tiling(tiny_folder: Path) -> None:
    plain = load(tiny_folder)
    assert not plain.pipeline.vae.use_slicing
    assert not plain.pipeline.vae.use_tiling
    knobs = load(tiny_folder, vae_slicing=True, vae_tiling=True)
    assert knobs.pipeline.vae.use_slicing
    assert knobs.pipeline.vae.use_tiling
    # Smaller than a tile, and alone: nothing to cut.
    assert an_image(knobs) == an_image(plain)


def test_a_vae_without_tiling_is_named(tiny: LoadedModel) -> None:
    class Pipeline:
        vae = torch.nn.Identity()

    with pytest.raises(ModelLoadError, match="vae_tiling: Pipeline has no VAE that can do it"):
        speed._enable(Pipeline(), "tiling")


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloading_needs_cuda(tiny_folder: Path, way: str) -> None:
    with pytest.raises(ModelLoadError, match="cpu_offload needs a CUDA device, this one is cpu"):
        load(tiny_folder, cpu_offload=way)


def test_offloading_and_compiling_exclude_one_another() -> None:
    with pytest.raises(ModelLoadError, match="compile and cpu_offload cannot be combined"):
        speed.check_speed(SpeedSettings(cpu_offload="model", compile=True), torch.device("cuda"))


def test_quantizing_and_compiling_exclude_one_another() -> None:
    with pytest.raises(ModelLoadError, match="compile and quantization cannot be combined"):
        speed.check_speed(SpeedSettings(quantization="int8", compile=True), torch.device("cpu"))


def test_offloading_first_and_parking_second_survives_the_end_of_a_call(tiny_folder: Path) -> None:
    """Accelerate's hooks as CUDA would get them, here with the CPU as the device."""
    model = load(tiny_folder)
    unet = model.pipeline.unet
    _, hook = cpu_offload_with_hook(unet, execution_device=torch.device("cpu"))
    model.pipeline._all_hooks = [hook]
    offloading = unet.forward
    detach = make_parkable(unet, "unet", "forward", stage="denoise")
    parked = unet.forward
    an_image(model)
    assert unet.forward is parked
    detach()
    assert unet.forward is offloading


def test_quantization_without_its_package_says_what_to_install(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"torchao: pip install 'stepserve\[quantization\]'"):
        load(tiny_folder, quantization="int8")


@pytest.mark.skipif(find_spec("torchao") is None, reason="the extra `quantization`")
@pytest.mark.parametrize("way", sorted(speed.QUANTIZERS))
@pytest.mark.parametrize("family", ["tiny_folder", "flux_folder"])
def test_quantization_makes_the_denoisers_linear_layers_integers(
    way: str, family: str, request: pytest.FixtureRequest
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(request.getfixturevalue(family), quantization=way)
    denoiser = speed.denoiser_of(model.pipeline)
    linear = [m for m in denoiser.modules() if isinstance(m, torch.nn.Linear)]
    kinds = {type(module.weight).__name__ for module in linear}
    assert kinds == {"Int8Tensor"}
    assert not any(type(p).__name__ == "Int8Tensor" for p in model.pipeline.vae.parameters())
    if family == "tiny_folder":
        assert len(an_image(model)) == 64 * 64 * 3
