"""Previews: what is predicted, when, and that nothing else changes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stepserve.domain.events import Finished, Preview
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.requests.previews import Denoised, Observed, clean_latents, preview_steps
from stepserve.pipelines.schedulers.usable import Configured, usable_schedulers
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_families import save_tiny_flux, save_tiny_sd3
from tiny_model import Inbox, a_request, default_scheduler

NAMES = sorted(usable_schedulers(default_scheduler()))


def said(
    prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, alpha: float, sigma: float
):
    """What a perfect network would say."""
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
    }[prediction_type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_network_is_understood_by_every_scheduler(name: str, prediction_type: str):
    config = {**default_scheduler().config, "prediction_type": prediction_type}
    scheduler = Configured.of(getattr(diffusers, name), config).build()
    scheduler.set_timesteps(10)
    if name not in usable_schedulers(scheduler):
        pytest.skip(f"{name} does not know {prediction_type}")
    observed = Observed(scheduler)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 4, 8, 8, generator=generator)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    timestep = scheduler.timesteps[0]
    sample = scheduler.add_noise(clean, noise, timestep.reshape(1))
    alpha, sigma = level(scheduler, timestep)
    scheduler.scale_model_input(sample, timestep)
    output = said(prediction_type, clean, noise, alpha, sigma)
    arguments = {"generator": generator} if "Ancestral" in name else {}
    scheduler.step(output, timestep, sample, **arguments)

    predicted = observed.predict()
    assert predicted is not None
    # At the very first step alpha is small, and float32 leaves few digits.
    assert torch.allclose(predicted, clean, atol=2e-2)


def level(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        ratio = float(sigmas[0])
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha
    squared = float(scheduler.alphas_cumprod[int(timestep)])
    return squared**0.5, (1 - squared) ** 0.5


def test_flow_matching_is_understood():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    sigma = float(scheduler.sigmas[3])
    seen = Denoised((1 - sigma) * clean + sigma * noise, noise - clean, scheduler.timesteps[3], 3)

    assert torch.allclose(clean_latents(scheduler, seen), clean, atol=1e-5)


@given(st.integers(0, 50), st.integers(1, 200))
def test_previews_are_spread_and_never_after_the_end(previews: int, steps: int):
    chosen = preview_steps(previews, steps)

    assert len(chosen) == len(set(chosen)) <= previews
    assert all(0 < step < steps for step in chosen)
    assert chosen == sorted(chosen)
    if previews < steps:
        assert len(chosen) == previews


def test_previews_come_in_order_and_change_no_byte(runner: PipelineRunner):
    plain, watched = Inbox(), Inbox()
    runner.submit(a_request(id="plain", num_inference_steps=6, n=2), plain)
    alone = plain.wait()
    runner.submit(a_request(id="watched", num_inference_steps=6, n=2, previews=2), watched)
    finished = watched.wait()

    assert isinstance(alone, Finished)
    assert isinstance(finished, Finished)
    assert [i.data for i in finished.images] == [i.data for i in alone.images]
    previews = [event for event in watched.events if isinstance(event, Preview)]
    assert [(p.index, p.step, p.steps) for p in previews] == [(0, 2, 6), (1, 4, 6)]
    assert [image.seed for image in previews[0].images] == [3, 4]
    sizes = {Image.open(io.BytesIO(image.data)).size for p in previews for image in p.images}
    assert sizes == {(64, 64)}


@pytest.mark.parametrize("save", [save_tiny_flux, save_tiny_sd3])
def test_other_families_are_previewed_too(save: Any, tmp_path: Path):
    model = load_model("other", save(tmp_path / "model"), dtype="float32")
    sizes = model.capabilities.sizes
    request = a_request(
        model="other",
        width=sizes.native,
        height=sizes.native,
        scheduler=model.capabilities.default_scheduler,
        num_inference_steps=4,
        previews=3,
    )
    seen: list[tuple[int, int, int, tuple[int, int]]] = []
    with torch.inference_mode():
        make_images(
            model,
            request,
            on_preview=lambda i, step, steps, images: seen.append((i, step, steps, images[0].size)),
        )

    native = (sizes.native, sizes.native)
    assert seen == [(0, 1, 4, native), (1, 2, 4, native), (2, 3, 4, native)]
