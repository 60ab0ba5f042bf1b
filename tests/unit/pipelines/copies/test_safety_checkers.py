"""Images that a model's own safety checker flags are withheld, and said to be."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from stepserve import cli
from stepserve.domain.errors import ContentFilteredError
from stepserve.domain.events import Failed, Finished, Preview
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.copies.safety_checker import guardrail, withheld_images
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.probing.probe_requests import make_probe_requests
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.serving.runner import PipelineRunner
from stepserve.pipelines.serving.warm_up import warm_up
from tiny_model import NATIVE_PX, UNTRIED, Inbox, a_request, submit_all
from transformers import CLIPConfig, CLIPImageProcessor
from typer.testing import CliRunner

SEED, N = 3, 4


def make_checker() -> StableDiffusionSafetyChecker:
    """A real one, tiny, with random concepts."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = sizes | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config)
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        embeds.data.normal_()
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.concept_embeds_weights.data.fill_(2.0)
    # Small weights would see hardly any difference between two images.
    checker.vision_model.embeddings.patch_embedding.weight.data.normal_()
    return checker


def scores(model: LoadedModel) -> list[float]:
    """What the checker sees in the images of seeds 3 to 6: how near to its first concept."""
    seen: list[float] = []
    checker = model.pipeline.safety_checker
    handle = checker.visual_projection.register_forward_hook(
        lambda module, args, output: seen.extend(
            torch.nn.functional.cosine_similarity(output, checker.concept_embeds[:1]).tolist()
        )
    )
    make_images(model, a_request(seed=SEED, n=N))
    handle.remove()
    return seen


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    size = {"height": 32, "width": 32}
    parts = plain.components | {
        "safety_checker": make_checker(),
        "feature_extractor": CLIPImageProcessor(crop_size=size, size={"shortest_edge": 32}),
    }
    folder = tmp_path_factory.mktemp("checked")
    StableDiffusionPipeline(**parts, requires_safety_checker=True).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> LoadedModel:
    return load_model("tiny", folder, dtype="float32", device="cpu")


@pytest.fixture
def serve(model: LoadedModel) -> Iterator[Callable[[], PipelineRunner]]:
    runners = []

    def start() -> PipelineRunner:
        options = EngineOptions(max_rows=16, max_pending_images=64)
        runners.append(PipelineRunner(model, options, sharing=UNTRIED))
        return runners[-1]

    yield start
    for runner in runners:
        runner.stop()


def flag_above(model: LoadedModel, threshold: float) -> None:
    model.pipeline.safety_checker.concept_embeds_weights.data[0] = threshold


def flag_some(model: LoadedModel) -> list[int]:
    """Set the checker so that it flags some images of seeds 3 to 6; returns their seeds."""
    seen = scores(model)
    ordered = sorted(seen)
    gap, below = max((high - low, low) for low, high in pairwise(ordered))
    assert gap > 0.002, "it rounds to a thousandth"
    flag_above(model, below + gap / 2)
    return [SEED + index for index, score in enumerate(seen) if score > below]


def finish(inbox: Inbox) -> Finished:
    outcome = inbox.wait()
    assert isinstance(outcome, Finished), outcome
    return outcome


def test_some_images_of_a_request_are_withheld(
    model: LoadedModel, serve: Callable[[], PipelineRunner]
) -> None:
    flagged = flag_some(model)
    runner = serve()
    (inbox,) = submit_all(runner, [a_request(seed=SEED, n=N)])
    runner.start()
    images = finish(inbox).images
    assert [image.seed for image in images] == [SEED + index for index in range(N)]
    assert [image.seed for image in images if image.content_filtered] == flagged
    for image in images:
        assert bool(image.data) != image.content_filtered
        if image.data:
            assert len(Image.open(io.BytesIO(image.data)).getcolors(NATIVE_PX**2) or ()) > 1
    assert runner.images_withheld == len(flagged) > 0


def test_requests_that_share_forwards_have_verdicts_of_their_own(
    model: LoadedModel, serve: Callable[[], PipelineRunner]
) -> None:
    flagged = flag_some(model)
    runner = serve()
    seeds = range(SEED, SEED + N)
    inboxes = submit_all(runner, [a_request(id=str(seed), seed=seed) for seed in seeds])
    runner.start()
    for seed, inbox in zip(seeds, inboxes, strict=True):
        outcome = inbox.wait()
        if seed in flagged:
            assert isinstance(outcome, Failed)
            assert isinstance(outcome.error, ContentFilteredError)
            assert "the safety checker of model tiny withheld all" in outcome.error.message
        else:
            assert isinstance(outcome, Finished)
    assert runner.engine.counters.retries == 0
    assert runner.images_withheld == len(flagged) > 0


def test_previews_of_what_is_flagged_are_withheld_as_well(
    model: LoadedModel, serve: Callable[[], PipelineRunner]
) -> None:
    flag_above(model, -2.0)
    runner = serve()
    (inbox,) = submit_all(runner, [a_request(num_inference_steps=4, previews=2)])
    runner.start()
    assert isinstance(inbox.wait(), Failed)
    previews = [event for event in inbox.events if isinstance(event, Preview)]
    assert len(previews) == 2
    for preview in previews:
        assert [(i.data, i.content_filtered) for i in preview.images] == [(b"", True)]


def test_a_model_whose_warm_up_is_flagged_serves(
    model: LoadedModel, serve: Callable[[], PipelineRunner]
) -> None:
    flag_above(model, -2.0)
    runner = serve()
    runner.start()
    warm_up(runner)


def test_trials_compare_what_was_drawn(model: LoadedModel) -> None:
    """Two black images would look equal, whatever sharing did to them."""
    flag_above(model, -2.0)
    one, other, *_ = (trial() for trial in make_probe_requests(model))
    assert not torch.equal(one, other)


def test_a_checker_may_be_dropped(folder: Path) -> None:
    kept = load_model("tiny", folder, dtype="float32", device="cpu")
    dropped = load_model("tiny", folder, dtype="float32", device="cpu", safety_checker="drop")
    assert kept.capabilities.safety_checker
    assert not dropped.capabilities.safety_checker
    flag_above(kept, -2.0)
    with pytest.raises(ContentFilteredError):
        make_images(kept, a_request())
    (image,) = make_images(dropped, a_request())
    assert image is not None


def test_a_folder_without_a_checker_is_the_same_either_way(tiny_folder: Path) -> None:
    for choice in ("keep", "drop"):
        model = load_model("tiny", tiny_folder, "float32", "cpu", safety_checker=choice)
        assert not model.capabilities.safety_checker
        assert make_images(model, a_request())[0] is not None


@pytest.mark.parametrize(
    ("verdicts", "withheld"),
    [
        ({}, ()),
        ({"nsfw_content_detected": None}, ()),
        ({"nsfw_content_detected": [False, True]}, (1,)),
        # DeepFloyd's IF paints watermarked images black as well.
        ({"nsfw_detected": [True, False], "watermark_detected": [False, True]}, (0, 1)),
    ],
)
def test_verdicts_of_every_family(verdicts: dict[str, Any], withheld: tuple[int, ...]) -> None:
    assert withheld_images(SimpleNamespace(**verdicts)) == frozenset(withheld)


def test_cosmos_refuses_prompts_by_raising() -> None:
    with pytest.raises(ContentFilteredError, match="of model cosmos refused the prompt"):  # noqa: SIM117
        with guardrail("cosmos"):
            raise ValueError("Cosmos Guardrail detected unsafe text in the prompt: x.")
    with pytest.raises(ValueError, match="other"), guardrail("cosmos"):
        raise ValueError("other")


def generate(folder: Path, config: Path, **model: str) -> Any:
    settings = {"models": {"tiny": {"path": str(folder), "dtype": "float32", **model}}}
    config.write_text(json.dumps(settings))
    seed = ["--seed", str(SEED), "-n", str(N), "--steps", "2", "--size", f"{NATIVE_PX}x{NATIVE_PX}"]
    output = ["-o", str(config.with_name("a.png")), "--scheduler", "DDIMScheduler"]
    prompt = a_request().prompt
    return CliRunner().invoke(
        cli.app, ["generate", prompt, *seed, *output, "--guidance", "4", "--config", str(config)]
    )


def test_the_command_line_says_it_as_well(model: LoadedModel, folder: Path, tmp_path: Path) -> None:
    flagged = flag_some(model)
    threshold = model.pipeline.safety_checker.concept_embeds_weights[0].item()
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    weights = copied / "safety_checker" / "model.safetensors"
    tensors = load_file(weights)
    tensors["concept_embeds_weights"][0] = threshold
    save_file(tensors, weights, {"format": "pt"})

    told = generate(copied, tmp_path / "config.yaml")
    assert told.exit_code == 0, told.output
    for index in range(N):
        is_flagged = SEED + index in flagged
        assert (tmp_path / f"a-{index}.png").exists() != is_flagged
        assert (f"withheld by the model's safety checker  seed {SEED + index}" in told.stderr) == (
            is_flagged
        )

    tensors["concept_embeds_weights"][0] = -2.0
    save_file(tensors, weights, {"format": "pt"})
    refused = generate(copied, tmp_path / "config.yaml")
    assert isinstance(refused.exception, ContentFilteredError)
    dropped = generate(copied, tmp_path / "config.yaml", safety_checker="drop")
    assert dropped.exit_code == 0, dropped.output
    assert all((tmp_path / f"a-{index}.png").exists() for index in range(N))
