"""Models of one's own images: trained, interrupted, continued, exported, drawn with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import stepserve
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DiffusionPipeline
from image_folders import write_image, write_images
from PIL import Image
from stepserve.training.data.folders.pixels import load_pixels
from stepserve.training.diffusion import NoiseSchedule, Prediction
from stepserve.training.errors import CheckpointError, RecipeError
from stepserve.training.folder import check_folder, make_stage, train_folder
from stepserve.training.loop.hyperparameters import LoopConfig, step_generator
from stepserve.training.loop.loop import Trainer
from stepserve.training.recipe_files import FolderRecipe, load_recipe, recipe_text
from stepserve.training.stages.folder_pixels import Augmentation, FolderStage, Objective, Precision
from stepserve.training.stages.pixels import BetaSchedule, PixelConfig

SIDE_PX = 16
SHAPE = PixelConfig(
    size_px=SIDE_PX,
    channels=3,
    block_channels=(8, 16),
    attention_head_width=8,
    norm_groups=4,
    timesteps=20,
)
LOOP = LoopConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-3,
    warmup_steps=2,
    checkpoint_interval_steps=2,
    sample_interval_steps=4,
)
RECIPE = FolderRecipe(
    model=SHAPE,
    objective=Objective(snr_gamma=5.0, offset_noise=0.1, accumulation_steps=2),
    augmentation=Augmentation(flip=True, crop_margin_px=2),
    loop=LOOP,
)


class KilledError(Exception):
    """Ends a training in the middle of a step."""


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", "cat/1.png", "cat/2.png", "owl/3.png")


def stage_of(recipe: FolderRecipe, images: Path, output: Path) -> FolderStage:
    return make_stage(recipe, check_folder(recipe, images)[0], output)


def weights(pipeline: DiffusionPipeline) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for each in pipeline.unet.parameters()])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_and_continued_equals_uninterrupted_bit_for_bit(
    classes: Path, tmp_path: Path, precision: Precision
) -> None:
    recipe = replace(RECIPE, objective=replace(RECIPE.objective, precision=precision))
    whole = stage_of(recipe, classes, tmp_path / "whole").train()

    stage = stage_of(recipe, classes, tmp_path / "killed")
    usual = stage.loss

    def kill_at_the_last_step(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == 3:
            raise KilledError
        return usual(step, generator)

    stage.loss = kill_at_the_last_step
    with pytest.raises(KilledError):
        stage.train()
    again = stage_of(recipe, classes, tmp_path / "killed")
    torch.rand(7)  # What else uses random numbers does not matter.
    assert torch.equal(weights(again.train()), weights(whole))


def test_a_folder_that_changed_is_not_continued_with(classes: Path, tmp_path: Path) -> None:
    stage_of(RECIPE, classes, tmp_path / "out").train()
    write_image(classes, "cat/1.png", 99)
    with pytest.raises(CheckpointError, match="images was"):
        stage_of(RECIPE, classes, tmp_path / "out").train()


def test_class_folders_make_a_model_with_classes(classes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    model = train_folder(RECIPE, check_folder(RECIPE, classes)[0], output)
    pipeline = ConsistencyModelPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.num_class_embeds == 2
    drawn = pipeline(class_labels=1, num_inference_steps=2).images[0]
    assert (drawn.size, drawn.mode) == ((SIDE_PX, SIDE_PX), "RGB")
    card = (model / "README.md").read_text()
    assert "2 classes: cat (2), owl (1)" in card
    assert str(classes) not in card
    assert load_recipe(output / "recipe.yaml") == RECIPE
    with Image.open(output / "samples-000004.png") as sheet:
        assert sheet.width == 8 * (SIDE_PX + 2) - 2


def test_other_images_make_a_model_without(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "a.png", "b.png")
    model = train_folder(RECIPE, check_folder(RECIPE, images)[0], tmp_path / "out")
    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2).images[0].size == (SIDE_PX, SIDE_PX)


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_loss_of_an_oracle_is_zero(
    classes: Path, tmp_path: Path, prediction: Prediction, schedule: BetaSchedule
) -> None:
    shape = replace(SHAPE, prediction=prediction, beta_schedule=schedule)
    objective = Objective(snr_gamma=5.0, precision="float32")
    recipe = replace(RECIPE, model=shape, objective=objective, augmentation=Augmentation())
    stage = stage_of(recipe, classes, tmp_path)
    # Of one image the network's right answer is known from x_t alone.
    x_0 = stage.pixels[:1].float() / 127.5 - 1
    stage.pixels, stage.labels = stage.pixels[:1], stage.labels[:1]

    class Oracle(torch.nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> object:
            signal, sigma = stage.schedule.scales(t, x_t)
            noise = (x_t - signal * x_0) / sigma
            known = x_0.expand_as(x_t)
            return Output(stage.schedule.target(stage.config.prediction, known, noise, t))

    stage.unet = Oracle()
    assert stage.loss(0, torch.Generator().manual_seed(0)) < 1e-6
    stage.pixels = 255 - stage.pixels
    assert stage.loss(0, torch.Generator().manual_seed(0)) > 1e-2


class Output:
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


def test_offset_noise_is_shared_by_the_pixels_of_a_channel(classes: Path, tmp_path: Path) -> None:
    noisy = replace(RECIPE, objective=Objective(offset_noise=3.0))
    shape = torch.Size((64, 3, SIDE_PX, SIDE_PX))
    offset = stage_of(noisy, classes, tmp_path).noise(shape, torch.Generator().manual_seed(0))
    means = offset.mean(dim=(2, 3))
    assert 2 < means.std() < 4
    assert 0.95 < (offset - means[:, :, None, None]).std() < 1.05


def test_zero_terminal_snr_trains_and_draws_from_noise_alone(classes: Path, tmp_path: Path) -> None:
    shape = replace(SHAPE, prediction=Prediction.VELOCITY)
    recipe = replace(RECIPE, model=shape, objective=Objective(zero_terminal_snr=True))
    stage = stage_of(recipe, classes, tmp_path)
    expected = NoiseSchedule.linear(20).with_zero_terminal_snr().alpha_bar
    torch.testing.assert_close(stage.schedule.alpha_bar, expected)
    pipeline = stage.train()
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(class_labels=0, num_inference_steps=20, output_type="np").images
    assert torch.from_numpy(drawn).isfinite().all()


def test_augmentation_gives_crops_and_mirrorings_of_the_image(
    classes: Path, tmp_path: Path
) -> None:
    stage = stage_of(RECIPE, classes, tmp_path)
    stage.pixels, stage.labels = stage.pixels[:1], stage.labels[:1]
    whole = stage.pixels[0].float() / 127.5 - 1
    crops = [whole[:, y : y + SIDE_PX, x : x + SIDE_PX] for y in range(3) for x in range(3)]
    possible = [crop for each in crops for crop in (each, each.flip(-1))]
    seen = set()
    for seed in range(20):
        images, _ = stage.batch(torch.Generator().manual_seed(seed))
        for image in images:
            matches = [i for i, crop in enumerate(possible) if torch.equal(crop, image)]
            assert len(matches) == 1
            seen.update(matches)
    assert len(seen) == 18


def test_the_gradients_of_a_step_are_those_of_the_mean_loss_of_its_batches(
    classes: Path, tmp_path: Path
) -> None:
    objective = replace(RECIPE.objective, precision="float32")
    stage = stage_of(replace(RECIPE, objective=objective), classes, tmp_path)
    generator = step_generator(LOOP.seed, 0)
    mean = (stage.loss(0, generator) + stage.loss(0, generator)) / 2
    expected = torch.autograd.grad(mean, list(stage.unet.parameters()))

    before = [parameter.detach().clone() for parameter in stage.unet.parameters()]
    one_step = replace(LOOP, steps=1, clip_norm=1e9)
    modules = torch.nn.ModuleDict({"unet": stage.unet})
    Trainer("one", one_step, modules, stage.loss, tmp_path / "one", accumulation_steps=2).run()
    for parameter, gradient in zip(stage.unet.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    after = list(stage.unet.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_pixels_are_the_middle_square_scaled(tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (16, 0, 80, 32))  # The filter sees a little beyond the square.
    write_image(tmp_path, "a.png", wide)
    write_image(tmp_path, "b.png", 1)
    pixels = load_pixels(check_folder(RECIPE, tmp_path)[0], 8)
    assert pixels.shape == (2, 3, 8, 8)
    assert (pixels[0] == [[[0]], [[0]], [[255]]]).all()


def test_the_usual_recipe_is_read_and_reads_back(tmp_path: Path) -> None:
    usual = load_recipe()
    (tmp_path / "recipe.yaml").write_text(recipe_text(usual))
    assert load_recipe(tmp_path / "recipe.yaml") == usual


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kind: latent", "kind: Input should be 'pixel'"),
        ("model: {size: 3}", "model.size: Unexpected"),
        ("loop: {steps: 0, batch_size: 1, learning_rate: 1}", "steps must be at least 1"),
        ("model: {size_px: 33, channels: 3}", "size_px 33 is not a multiple of 4"),
        ("model: {channels: 1}", "channels must be 3"),
        ("model: {channels: 3, prediction: score}", "model.prediction: Input should be"),
        ("{model: {channels: 3}, objective: {zero_terminal_snr: true}}", "needs prediction"),
        ("objective: {zero_terminal_snr: true, snr_gamma: 5}", "leave one out"),
        ("objective: {precision: int8}", "objective.precision: Input should be"),
        ("objective: {offset_noise: -1}", "offset_noise must be at least 0"),
        ("augmentation: {crop_margin_px: -1}", "crop_margin_px must be at least 0"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused_by_field(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_the_command_tells_what_it_found_and_trains(classes: Path, tmp_path: Path) -> None:
    (classes / "owl" / "bad.png").write_bytes(b"no image")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe_text(RECIPE))
    given = (str(classes), "--out", str(tmp_path / "out"), "--recipe", str(recipe))
    checked = stepserve("train", *given, "--check").stdout
    assert "owl/bad.png: skipped: not an image" in checked
    assert "2 classes: cat (2), owl (1)" in checked
    assert not (tmp_path / "out").exists()
    trained = stepserve("train", *given, "--steps", "1").stdout
    assert f"trained: {tmp_path / 'out' / 'model'}" in trained
    refused = stepserve("train", "folder", *given, "--size", "15", expect=1)
    assert "size_px 15 is not a multiple of 2" in refused.stderr
    empty = stepserve("train", str(tmp_path / "none"), "--out", str(tmp_path / "x"), expect=1)
    assert "is not a folder" in empty.stderr
