"""A model whose weights are not all there, or are no numbers, does not serve."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stepserve.domain.errors import GenerationFailedError
from stepserve.domain.events import Failed
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading import folders as loading
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.loading.weights import check_finite_weights, check_heard, is_finite
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up
from tiny_model import UNTRIED, Inbox, a_request
from torch import Tensor

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
WEIGHTS = {
    "unet": "mid_block.resnets.0.conv1.weight",
    "text_encoder": "encoder.layers.0.mlp.fc1.weight",
    "vae": "decoder.conv_out.weight",
}


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def change(folder: Path, component: str, how: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / FILES[component]
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path, {"format": "pt"})


def spoil(folder: Path, component: str, value: float = math.nan) -> None:
    change(folder, component, lambda tensors: tensors[WEIGHTS[component]].view(-1)[0].fill_(value))


@pytest.mark.parametrize("component", list(FILES))
def test_a_weight_that_the_files_lack_is_named(copied: Path, component: str) -> None:
    """The libraries would make one up by chance, and only warn of it."""
    change(copied, component, lambda tensors: tensors.pop(WEIGHTS[component]))
    with pytest.raises(ModelLoadError, match=f"lack weights: {WEIGHTS[component]}"):
        load_model("x", copied, dtype="float32", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_number_that_is_none_is_seen(dtype: torch.dtype, value: float, place: int) -> None:
    tensor = torch.randn(33, 65).to(dtype)
    tensor.view(-1)[place] = value
    assert bool(is_finite(tensor)) == math.isfinite(value)
    assert bool(is_finite(tensor.T)) == math.isfinite(value)
    assert bool(is_finite(tensor[:0]))


def test_what_the_libraries_say_is_read() -> None:
    check_heard(["Some weights were not used: ['x']", "y.weight | UNEXPECTED | "])
    check_heard(["pooler.dense.weight | MISSING | \npooler.dense.bias | MISSING | "])
    with pytest.raises(ModelLoadError, match=r"lack weights: a\.b, c\.d, e\.f$"):
        check_heard(["and are newly initialized: ['a.b', 'c.d']\nTrain", "Key\ne.f | MISSING | \n"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("component", list(FILES))
def test_a_weight_that_is_no_number_is_named(copied: Path, component: str, value: float) -> None:
    spoil(copied, component, value)
    wanted = f"NaN or infinite .*: {component}.{WEIGHTS[component]}"
    with pytest.raises(ModelLoadError, match=wanted):
        load_model("x", copied, dtype="float32", device="cpu")


def test_a_weight_too_large_for_the_dtype_is_named(copied: Path) -> None:
    spoil(copied, "vae", 1e30)
    load_model("x", copied, dtype="float32", device="cpu")
    with pytest.raises(ModelLoadError, match=r"in the dtype that was asked for: vae.decoder"):
        load_model("x", copied, dtype="float16", device="cpu")


@pytest.mark.parametrize("component", list(FILES))
def test_what_there_was_no_time_to_look_at_is_found_by_the_warm_up(
    copied: Path, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(copied, component)
    monkeypatch.setattr(
        loading, "check_finite_weights", lambda p: check_finite_weights(p, 0.5, count().__next__)
    )
    model = load_model("x", copied, dtype="float32", device="cpu")
    runner = PipelineRunner(model, EngineOptions(max_rows=4), sharing=UNTRIED)
    runner.start()
    try:
        with pytest.raises(ModelLoadError, match=f"{component}.{WEIGHTS[component]}"):
            warm_up(runner)
    finally:
        runner.stop()


def test_a_vae_that_overflows_is_told_and_makes_no_black_image(runner: PipelineRunner) -> None:
    weight, inbox = runner.model.pipeline.vae.decoder.conv_out.weight, Inbox()
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.inf)
        runner.submit(a_request(), inbox)
        outcome = inbox.wait()
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, GenerationFailedError)
    assert "the VAE overflows in this dtype" in outcome.error.message
