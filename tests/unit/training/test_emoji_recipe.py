"""The whole recipe, tiny, from artwork to a folder that plain diffusers loads."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from stepserve.training.data.artwork import Artwork
from stepserve.training.emoji import EmojiRecipe, make_recipe, train_emoji
from stepserve.training.errors import CheckpointError, ExportError, StartingModelError
from stepserve.training.export import check_promises, count_parameters
from stepserve.training.loop.checkpoint import load_checkpoint
from stepserve.training.stages.denoiser import DenoiserStage
from tiny_recipe import tiny_recipe


@pytest.fixture(scope="module")
def pipeline(trained: Path) -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(trained / "model", dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_model_loads_in_plain_diffusers_and_draws(pipeline: StableDiffusionPipeline) -> None:
    image = pipeline("red apple", num_inference_steps=2, guidance_scale=4.0).images[0]
    assert image.size == (16, 16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.config.scaling_factor != 0.18215


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 32), (32, 24)])
def test_other_sizes_work(pipeline: StableDiffusionPipeline, height: int, width: int) -> None:
    image = pipeline("owl", height=height, width=width, num_inference_steps=1).images[0]
    assert image.size == (width, height)


def test_loaded_tokens_are_those_of_the_training(
    pipeline: StableDiffusionPipeline, trained: Path
) -> None:
    kept = json.loads((trained / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert pipeline.tokenizer.get_vocab() == kept
    assert pipeline.tokenizer.model_max_length == 16


def test_folder_holds_what_it_promises(trained: Path) -> None:
    folder = trained / "model"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "training.json", "stepserve.json", "model_index.json"} <= names
    assert {"LICENSES/noto-emoji-Apache-2.0.txt", "LICENSES/fluent-emoji-MIT.txt"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    assert not list(trained.glob("*.partial"))
    assert not list(trained.glob("*.old"))


def test_everyone_may_read_the_files(trained: Path) -> None:
    modes = {path.stat().st_mode for path in (trained / "model").rglob("*") if path.is_file()}
    assert all(mode & stat.S_IROTH for mode in modes)


def test_licences_are_whole(trained: Path) -> None:
    licences = trained / "model" / "LICENSES"
    noto = (licences / "noto-emoji-Apache-2.0.txt").read_text()
    assert "Version 2.0, January 2004" in noto
    assert "END OF TERMS AND CONDITIONS" in noto
    fluent = (licences / "fluent-emoji-MIT.txt").read_text()
    assert "Copyright (c) Microsoft Corporation" in fluent
    assert "Permission is hereby granted" in fluent


def test_card_is_filled_in(trained: Path, pipeline: StableDiffusionPipeline) -> None:
    card = (trained / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "$" not in card
    assert "## What it cannot do" in card
    assert "`@iconify-json/noto` 1.2.9 from npm (Apache-2.0)" in card
    for count in count_parameters(pipeline).values():
        assert f"{count:,}" in card


def test_training_json_holds_the_whole_recipe(trained: Path) -> None:
    content = json.loads((trained / "model" / "training.json").read_text())
    assert content["recipe"]["denoiser"]["text_width"] == 32
    assert content["recipe"]["vae_loop"]["steps"] == 4
    assert content["images"] == 5
    assert content["versions"]["torch"] == torch.__version__
    assert content["command"].startswith("stepserve train emoji --seed 0 --steps 4")


def test_manifest_for_the_server(trained: Path) -> None:
    manifest = json.loads((trained / "model" / "stepserve.json").read_text())
    assert manifest["sizes"] == {"minimum": 8, "maximum": 32, "step": 8, "native": 16}


def test_sample_grids_are_drawn_as_it_goes(trained: Path) -> None:
    assert (trained / "vae" / "vae-000004.png").exists()
    assert (trained / "denoiser" / "samples-000004.png").exists()


def test_finished_training_is_not_repeated(artwork: Artwork, trained: Path) -> None:
    before = weights(trained / "model")
    kept = [trained / "latents.safetensors", *trained.glob("*/checkpoint.pt")]
    times = [path.stat().st_mtime_ns for path in kept]
    assert train_emoji(tiny_recipe(), trained, trained / "no-cache", artwork) == trained / "model"
    assert weights(trained / "model") == before
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_same_seed_same_model(artwork: Artwork, trained: Path, tmp_path: Path) -> None:
    model = train_emoji(tiny_recipe(), tmp_path, tmp_path / "no-cache", artwork)
    assert weights(model) == weights(trained / "model")


def test_crashed_training_ends_with_the_same_model(
    artwork: Artwork, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_loss = DenoiserStage.loss

    def crash_in_step_3(
        stage: DenoiserStage, step: int, generator: torch.Generator
    ) -> torch.Tensor:
        if step == 3:
            raise MemoryError
        return whole_loss(stage, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserStage, "loss", crash_in_step_3)
        with pytest.raises(MemoryError):
            train_emoji(tiny_recipe(), tmp_path, tmp_path / "no-cache", artwork)
    state = load_checkpoint(tmp_path / "denoiser" / "checkpoint.pt")
    assert state is not None
    assert state["step"] == 2
    model = train_emoji(tiny_recipe(), tmp_path, tmp_path / "no-cache", artwork)
    assert weights(model) == weights(trained / "model")


def test_checkpoint_of_other_names_is_refused(
    artwork: Artwork, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    other = replace(artwork, names=tuple(f"{name} pie" for name in artwork.names))
    with pytest.raises(CheckpointError, match=r"artwork\.names was"):
        train_emoji(tiny_recipe(), folder, tmp_path / "no-cache", other)


def test_lost_tokenizer_is_taken_from_the_model(
    artwork: Artwork, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(folder / "tokenizer")
    train_emoji(tiny_recipe(), folder, tmp_path / "no-cache", artwork)
    assert weights(folder / "model") == weights(trained / "model")


def test_checkpoint_of_another_tokenizer_is_refused(
    artwork: Artwork, trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["e</w>"] = vocabulary["e</w>"], vocabulary["a</w>"]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tokenizer was"):
        train_emoji(tiny_recipe(), folder, tmp_path / "no-cache", artwork)


def test_checkpoints_are_plain_and_fingerprinted(trained: Path) -> None:
    state = load_checkpoint(trained / "denoiser" / "checkpoint.pt")
    assert state is not None
    names = set(state["fingerprint"])
    assert {"artwork.names", "tokenizer", "autoencoder", "loop.seed"} <= names
    assert "loop.steps" not in names


def test_recipe_helper_changes_what_is_given() -> None:
    assert make_recipe() == EmojiRecipe()
    recipe = make_recipe(seed=7, denoiser_steps=10, vae_steps=20, batch_size=3, vae_batch_size=2)
    assert recipe.seed == recipe.vae_loop.seed == recipe.denoiser_loop.seed == 7
    assert (recipe.denoiser_loop.steps, recipe.denoiser_loop.batch_size) == (10, 3)
    assert (recipe.vae_loop.steps, recipe.vae_loop.batch_size) == (20, 2)
    assert recipe.denoiser_loop.learning_rate == EmojiRecipe().denoiser_loop.learning_rate


def test_command_tells_when_it_is_not_the_whole_recipe() -> None:
    usual = make_recipe(seed=3, denoiser_steps=100)
    assert usual.command == "stepserve train emoji --seed 3 --steps 100"
    assert "training.json" in make_recipe(seed=3, vae_steps=9).command


def test_parts_that_do_not_fit_are_refused() -> None:
    recipe = EmojiRecipe()
    with pytest.raises(ValueError, match=r"\(16, 8\), the denoiser wants \(4, 8\)"):
        replace(recipe, denoiser=replace(recipe.denoiser, latent_channels=4))


def test_pickles_and_big_files_are_not_exported(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    with pytest.raises(ExportError, match=r"weights\.bin"):
        check_promises(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with (tmp_path / "weights.safetensors").open("wb") as big:
        big.truncate(50_000_001)
    with pytest.raises(ExportError, match="50 MB limit"):
        check_promises(tmp_path)


def test_model_that_does_not_load_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ExportError, match="does not load again"):
        check_promises(tmp_path)


def test_a_model_is_trained_further(trained: Path, artwork: Artwork, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(seed=1, steps=2), start_from=str(trained / "model"))
    further = train_emoji(recipe, tmp_path / "run", tmp_path / "cache", artwork)
    first = StableDiffusionPipeline.from_pretrained(trained / "model")
    second = StableDiffusionPipeline.from_pretrained(further)
    told = json.loads((further / "training.json").read_text())
    card = (further / "README.md").read_text()

    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    for name, same in (("vae", True), ("unet", False), ("text_encoder", False)):
        weights = [getattr(pipeline, name).state_dict() for pipeline in (first, second)]
        equal = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        assert equal == same, name
    assert told["started_from"]["command"].startswith("stepserve train emoji --seed 0")
    assert f"--start-from {trained}" in card
    assert card.count("| denoiser |") == 2


@pytest.mark.parametrize("what", ["missing", "other shapes"])
def test_a_model_that_does_not_fit_cannot_be_trained_further(
    what: str, trained: Path, artwork: Artwork, tmp_path: Path
) -> None:
    folder = tmp_path / "nothing" if what == "missing" else trained / "model"
    recipe = replace(tiny_recipe(steps=2), start_from=str(folder))
    recipe = replace(recipe, denoiser=replace(recipe.denoiser, block_channels=(16, 48)))
    with pytest.raises(StartingModelError, match=r"no model to start from|does not fit"):
        train_emoji(recipe, tmp_path / "run", tmp_path / "cache", artwork)
