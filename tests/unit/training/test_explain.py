"""The strips show what the pipeline really did."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from stepserve.training.drawing.explain import (
    denoise,
    explain,
    forward_strip,
    load_for_explaining,
    reverse_strip,
    schedule_of,
    spread,
)
from stepserve.training.drawing.strips import CELL_PX, GAP_PX, HEAD_PX, MARGIN_PX
from stepserve.training.errors import ModelNotExplainableError


@pytest.fixture(scope="module")
def pipeline(trained: Path) -> StableDiffusionPipeline:
    return load_for_explaining(trained / "model")


def strip_size(columns: int, rows: int) -> tuple[int, int]:
    pitch = CELL_PX + GAP_PX
    return MARGIN_PX + columns * pitch, HEAD_PX + rows * pitch


def cell(strip: Image.Image, column: int, row: int) -> Image.Image:
    left = MARGIN_PX + column * (CELL_PX + GAP_PX)
    top = HEAD_PX + row * (CELL_PX + GAP_PX)
    return strip.crop((left, top, left + CELL_PX, top + CELL_PX))


def test_moments_are_a_chain_of_ddim_steps(pipeline: StableDiffusionPipeline) -> None:
    moments, _ = denoise(pipeline, "red apple", seed=1, steps=5)
    schedule = schedule_of(pipeline)
    assert [moment.timestep for moment in moments] == [999, 799, 599, 399, 199]
    for now, later in pairwise(moments):
        t, earlier = torch.tensor([now.timestep]), torch.tensor([later.timestep])
        made = schedule.ddim_step(now.x_t, now.velocity, t, earlier)
        torch.testing.assert_close(made, later.x_t, rtol=1e-4, atol=1e-4)


def test_recording_changes_nothing(pipeline: StableDiffusionPipeline) -> None:
    before = pipeline.scheduler
    _, image = denoise(pipeline, "red apple", seed=1, steps=3)
    assert pipeline.scheduler is before
    plain = pipeline(
        "red apple",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images[0]
    torch.testing.assert_close(image, plain * 2 - 1, rtol=0, atol=0)


def test_forward_strip_goes_from_image_to_static(pipeline: StableDiffusionPipeline) -> None:
    image = torch.zeros(3, 16, 16)
    strip = forward_strip(pipeline, image, seed=0, columns=4)
    assert strip.size == strip_size(columns=4, rows=2)
    spreads = [_spread(cell(strip, column, 0)) for column in range(4)]
    assert spreads == sorted(spreads)
    assert spreads[0] < 10 < 40 < spreads[-1]


def test_reverse_strip_ends_where_the_image_is(pipeline: StableDiffusionPipeline) -> None:
    moments, image = denoise(pipeline, "red apple", seed=1, steps=12)
    strip = reverse_strip(pipeline, moments)
    assert strip.size == strip_size(columns=8, rows=2)
    last = cell(strip, 7, 1).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    mean = ((image.mean(dim=(1, 2)) + 1) * 127.5).tolist()
    assert last == pytest.approx(mean, abs=3)


def test_explain_writes_both_strips(trained: Path, tmp_path: Path) -> None:
    paths = explain(trained / "model", tmp_path / "out", "owl", seed=3, steps=3)
    assert [path.name for path in paths] == ["explain-forward.png", "explain-reverse.png"]
    sizes = []
    for path in paths:
        with Image.open(path) as strip:
            sizes.append(strip.size)
    assert sizes == [strip_size(8, 2), strip_size(3, 2)]
    again = explain(trained / "model", tmp_path / "again", "owl", seed=3, steps=3)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotExplainableError, match="no diffusers pipeline in"):
        load_for_explaining(tmp_path)


def test_noise_predicting_model_is_refused(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    plain = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(plain.config, prediction_type="epsilon")
    pipeline.save_pretrained(tmp_path)
    pipeline.scheduler = plain
    with pytest.raises(ModelNotExplainableError, match="predicts epsilon"):
        load_for_explaining(tmp_path)


@pytest.mark.parametrize(
    ("count", "wanted", "indices"),
    [(3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (1, 8, [0]), (20, 8, [0, 3, 5, 8, 11, 14, 16, 19])],
)
def test_spread_has_both_ends(count: int, wanted: int, indices: list[int]) -> None:
    assert spread(count, wanted) == indices


def _spread(image: Image.Image) -> float:
    """Standard deviation of the gray levels."""
    levels = torch.tensor(list(image.convert("L").tobytes())).float()
    return levels.std().item()
