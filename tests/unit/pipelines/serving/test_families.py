"""Any pipeline that makes images from a prompt loads; others are refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.events import CutPrompt, Finished
from stepserve.domain.models import SizeRange
from stepserve.domain.tasks import Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.facts.prompts import measure_prompts
from stepserve.pipelines.facts.signature import accepted_arguments
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_families import (
    CLIP_TOKENS,
    T5_TOKENS,
    save_tiny_flux,
    save_tiny_sd3,
    word_tokenizer,
)
from tiny_model import UNTRIED, a_request, submit_all

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def flux(flux_folder: Path) -> LoadedModel:
    return load_model("flux", flux_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_sd3(tmp_path_factory.mktemp("sd3"))
    return load_model("sd3", folder, dtype="float32", device="cpu")


def drawn_image(model: LoadedModel, side_px: int) -> Image.Image:
    wanted = {
        "prompt": "red heart",
        "negative_prompt": "big apple",
        "width": side_px,
        "height": side_px,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "num_images_per_prompt": 1,
        "generator": [torch.Generator("cpu").manual_seed(1)],
        "no_such_argument": 1,
    }
    pipeline = model.factory.copy(model.capabilities.default_scheduler)
    with torch.no_grad():
        signature = model.factory.signature(Task.TEXT_TO_IMAGE)
        return pipeline(**accepted_arguments(signature, wanted)).images[0]


def test_flux_is_described_by_its_own_shapes_and_defaults(flux: LoadedModel) -> None:
    capabilities = flux.capabilities
    # Two by two latents of two pixels make a patch, and its authors took 128 latents a side.
    assert capabilities.sizes == SizeRange(128, 512, 4, 256)
    assert capabilities.schedulers == (SCHEDULER,)
    assert capabilities.default_num_inference_steps == 28
    assert capabilities.default_guidance_scale == 3.5
    assert capabilities.description.startswith("FluxPipeline from")


def test_stable_diffusion_3_is_no_larger_than_its_table_of_positions(sd3: LoadedModel) -> None:
    assert sd3.capabilities.sizes == SizeRange(8, 24, 4, 16)
    assert sd3.capabilities.default_num_inference_steps == 28
    assert sd3.capabilities.default_guidance_scale == 7.0


def test_a_copied_pipeline_of_another_family_makes_images(
    flux: LoadedModel, sd3: LoadedModel
) -> None:
    assert drawn_image(flux, 32).size == (32, 32)
    assert drawn_image(sd3, 24).size == (24, 24)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_is_taken_that_one_of_several_encoders_reads_whole(
    flux: LoadedModel, sd3: LoadedModel, field: str
) -> None:
    clips = {"flux": ["text_encoder"], "sd3": ["text_encoder", "text_encoder_2"]}
    for model in (flux, sd3):
        own = model.capabilities
        assert own.max_prompt_tokens == CLIP_TOKENS > T5_TOKENS
        assert model.prompt_meter.check(a_request(**{field: "red " * (T5_TOKENS - 1)})) == ()
        # Here CLIP's tokenizer counts letters, and T5's counts words.
        (cut,) = model.prompt_meter.check(a_request(**{field: "red " * T5_TOKENS}))
        t5 = "text_encoder_2" if own.id == "flux" else "text_encoder_3"
        assert cut == CutPrompt(field, t5, T5_TOKENS + 1, T5_TOKENS)
        cuts = model.prompt_meter.check(a_request(**{field: "heart" * 16}))
        assert cuts == tuple(CutPrompt(field, e, 82, CLIP_TOKENS) for e in clips[own.id])
        with pytest.raises(InvalidRequestError) as refused:
            model.prompt_meter.check(a_request(**{field: "heart " * 16}))
        assert f"{field} is 82 tokens long and the limit" in refused.value.message


def test_what_an_encoder_cut_is_told_with_the_images(flux: LoadedModel) -> None:
    runner = PipelineRunner(flux, EngineOptions(max_rows=4), sharing=UNTRIED)
    runner.start()
    sizes, scheduler = flux.capabilities.sizes, flux.capabilities.default_scheduler
    wanted = {"width": sizes.minimum, "height": sizes.minimum, "scheduler": scheduler}
    prompts = ("heart" * 16, "heart")
    inboxes = submit_all(runner, [a_request(id=p, prompt=p, **wanted) for p in prompts])
    long, short = (inbox.wait() for inbox in inboxes)
    runner.stop()
    assert isinstance(long, Finished), long
    assert isinstance(short, Finished), short
    assert long.cut_prompts == (CutPrompt("prompt", "text_encoder", 82, CLIP_TOKENS),)
    assert short.cut_prompts == ()


def test_the_pipelines_own_argument_limits_its_t5(tmp_path: Path, flux_folder: Path) -> None:
    """512 of FLUX; T5's tokenizer itself may have no limit."""
    folder = Path(shutil.copytree(flux_folder, tmp_path / "copied"))
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 10**30}))
    model = load_model("flux", folder, dtype="float32", device="cpu")
    assert model.capabilities.max_prompt_tokens == 512
    assert model.capabilities.max_prompt_characters > 4000
    cuts = model.prompt_meter.check(a_request(prompt="red " * 511))
    assert [cut.encoder for cut in cuts] == ["text_encoder"]
    with pytest.raises(InvalidRequestError, match=r"513 tokens long and the limit .* is 512"):
        model.prompt_meter.check(a_request(prompt="red " * 512))


@pytest.mark.parametrize(
    ("pipeline", "limits"),
    [
        ("HunyuanDiTPipeline", {"text_encoder": 77, "text_encoder_2": 256}),
        ("IFPipeline", {"text_encoder": 77}),
        ("Kandinsky3Pipeline", {"text_encoder": 128}),
        ("KandinskyCombinedPipeline", {"text_encoder": 77}),
    ],
)
def test_limits_in_the_code_of_pipelines_are_known(pipeline: str, limits: dict[str, int]) -> None:
    tokenizers = {e.replace("text_encoder", "tokenizer"): word_tokenizer(1000) for e in limits}
    made = type(pipeline, (), {"components": tokenizers})()
    meter = measure_prompts(made)
    assert meter.limit == max(limits.values())
    cuts = meter.check(a_request(prompt="red " * (max(limits.values()) - 1)))
    assert {cut.encoder for cut in cuts} == {e for e in limits if limits[e] < meter.limit}


def test_an_operator_may_accept_that_an_encoder_cuts(flux_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flux_folder, tmp_path / "copied"))
    (folder / "stepserve.json").write_text(json.dumps({"max_prompt_tokens": 90}))
    model = load_model("flux", folder, dtype="float32", device="cpu")
    assert model.capabilities.max_prompt_tokens == 90
    model.prompt_meter.check(a_request(prompt="red " * (T5_TOKENS + 1)))
    with pytest.raises(InvalidRequestError, match="limit of model tiny is 90"):
        model.prompt_meter.check(a_request(prompt="red " * 40))


def test_transformers_keep_their_memory_format(flux: LoadedModel, sd3: LoadedModel) -> None:
    for model in (flux, sd3):
        vae = next(p for p in model.pipeline.vae.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert vae.is_contiguous(memory_format=torch.channels_last)
        assert not model.pipeline.transformer.training
    patches = sd3.pipeline.transformer.pos_embed.proj.weight
    assert patches.is_contiguous()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("KandinskyV22Pipeline", "needs arguments that no request can give: image_embeds"),
        ("WanPipeline", "makes videos, not images"),
        ("SanaVideoPipeline", "makes videos, not images"),
        ("StableAudioPipeline", "makes sound, not images"),
        ("KandinskyV22PriorPipeline", "makes embeddings, not images"),
        ("NoSuchPipeline", "diffusers has no pipeline 'NoSuchPipeline'"),
        (["own_code", "OwnPipeline"], "no code of a folder is run"),
    ],
)
def test_other_pipelines_are_refused_before_weights_are_read(
    tmp_path: Path, name: object, reason: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (tmp_path / "own_code.py").write_text("raise SystemExit('code of a folder was run')")
    with pytest.raises(ModelLoadError, match=reason):
        load_model("x", tmp_path)


def test_code_that_a_component_brings_is_not_run(flux_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(flux_folder, tmp_path / "copied"))
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["own_code", "OwnTransformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer/own_code.py").write_text("raise SystemExit('code of a folder was run')")
    with pytest.raises(ModelLoadError, match=r"own_code|trust_remote_code"):
        load_model("x", folder)
