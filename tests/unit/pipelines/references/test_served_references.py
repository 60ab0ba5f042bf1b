"""Reference images from the file to the finished image, through an engine that others share."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from ip_adapter_weights import save_adapter, tiny_image_encoder, unet_weights
from PIL import Image
from stepserve.config import SpeedSettings
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.events import Failed, Finished
from stepserve.domain.models import Compilation
from stepserve.domain.requests import GenerationRequest, ReferenceUse
from stepserve.domain.tasks import Count, Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import LoadedModel, load_model
from stepserve.pipelines.modules.wrappers import describe_wrappers
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.references.files import IpAdapterFiles
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_adapters import save_adapter as save_lora
from tiny_adapters import uses, with_adapters
from tiny_model import UNTRIED, Inbox, a_request, default_scheduler, submit_all, tiny_unet

NAMES = ("style", "face")
OPTIONS = EngineOptions(max_rows=16, max_pending_images=32)


def photo(seed: int) -> bytes:
    """An image file of its own."""
    values = np.random.default_rng(seed).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def reference(seed: int, scale: float = 0.6, adapter: str = "style") -> ReferenceUse:
    return ReferenceUse(photo(seed), scale, adapter)


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folders: list[Path] = []
    encoder = tiny_image_encoder()
    for name in NAMES:
        torch.manual_seed(len(folders))
        folder = tmp_path_factory.mktemp(name)
        folders.append(save_adapter(folder, unet_weights(tiny_unet()), encoder))
    return tuple(folders)


def load(folder: Path, adapter_folders: Sequence[Path], **options: Any) -> LoadedModel:
    files = [
        IpAdapterFiles(name, at / "ip-adapter.safetensors", at / "image_encoder")
        for name, at in zip(NAMES, adapter_folders, strict=True)
    ]
    return load_model("tiny", folder, "float32", "cpu", ip_adapters=files, **options)


@pytest.fixture(scope="module")
def model(tiny_folder: Path, adapter_folders: Sequence[Path]) -> LoadedModel:
    return load(tiny_folder, adapter_folders)


@pytest.fixture
def served(model: LoadedModel) -> Iterator[PipelineRunner]:
    runner = PipelineRunner(model, OPTIONS, sharing=UNTRIED)
    runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def plain(tiny_folder: Path, adapter_folders: Sequence[Path]) -> Any:
    """diffusers' own, with each adapter once."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipeline.load_ip_adapter(
        [str(folder) for folder in adapter_folders], "", ["ip-adapter.safetensors"] * 2
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = default_scheduler()
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def call_plain(pipeline: Any, request: GenerationRequest, **more: Any) -> list[Any]:
    """What diffusers draws, with scales for all that it draws at once. One reference an adapter."""
    by_name = {use.adapter: use for use in request.references}
    pipeline.set_ip_adapter_scale([by_name[n].scale if n in by_name else 0.0 for n in NAMES])
    # What has a scale of 0 is not looked at.
    files = [by_name[n].image if n in by_name else photo(0) for n in NAMES]
    copied = copy.copy(pipeline)
    copied.scheduler = copy.deepcopy(pipeline.scheduler)
    images: list[Any] = copied(
        prompt=request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.n,
        generator=[torch.Generator().manual_seed(request.seed + i) for i in range(request.n)],
        ip_adapter_image=[Image.open(io.BytesIO(file)).convert("RGB") for file in files],
        **more,
    ).images
    return images


def finished(inbox: Inbox) -> Finished:
    outcome = inbox.wait()
    assert isinstance(outcome, Finished), outcome
    return outcome


def levels(image: Any) -> Any:
    opened = Image.open(io.BytesIO(image.data)) if hasattr(image, "data") else image
    return np.asarray(opened.convert("RGB"), dtype=np.int16)


def check_same(made: Finished, expected: Sequence[Any]) -> None:
    assert len(made.images) == len(expected)
    for one, other in zip(made.images, expected, strict=True):
        assert np.abs(levels(one) - levels(other)).max() <= 1


REQUESTS = (
    a_request(id="a", references=(reference(1, 0.8),), num_inference_steps=4),
    a_request(id="b", num_inference_steps=4, seed=5),
    a_request(id="c", references=(reference(2, 0.3), reference(3, 1.0, "face")), seed=6),
    a_request(id="d", references=(reference(1, 0.8),), guidance_scale=1.0, seed=7),
    a_request(id="e", references=(reference(4, 1.2, "face"),), n=3, seed=8),
)


def test_requests_share_forwards_and_get_what_diffusers_draws_for_each(
    served: PipelineRunner, plain: Any
) -> None:
    """With other scales, adapters, image counts, without guidance, and without references."""
    before = served.engine.counters
    forwards, calls = before.forwards, before.calls
    made = [finished(inbox) for inbox in submit_all(served, REQUESTS)]
    for request, outcome in zip(REQUESTS, made, strict=True):
        check_same(outcome, call_plain(plain, request))
    assert served.engine.counters.retries == 0
    assert served.engine.counters.calls - calls > served.engine.counters.forwards - forwards


def test_a_request_without_references_gets_the_bytes_of_a_model_without_adapters(
    served: PipelineRunner, runner: PipelineRunner
) -> None:
    (adapted,) = submit_all(served, [REQUESTS[1]])
    (without,) = submit_all(runner, [REQUESTS[1]])
    assert finished(adapted).images[0].data == finished(without).images[0].data


def test_a_reference_shows(served: PipelineRunner) -> None:
    requests = [
        replace(REQUESTS[0], id=f"{i}", references=refs)
        for i, refs in enumerate(
            [
                (),
                (reference(1),),
                (reference(2),),
                (reference(1, adapter="face"),),
                (reference(1, 0.1),),
            ]
        )
    ]
    made = [levels(finished(inbox).images[0]) for inbox in submit_all(served, requests)]
    for index, one in enumerate(made):
        for other in made[:index]:
            assert np.abs(one - other).max() > 2


def test_where_guidance_is_limited_scales_are_narrowed_with_the_rows(
    served: PipelineRunner, plain: Any
) -> None:
    """Steps without guidance have one row instead of two, and its scale."""
    request = a_request(references=(reference(1, 0.8),), num_inference_steps=4, guidance_end=0.5)
    (inbox,) = submit_all(served, [request])
    mixed = finished(inbox)
    guided, unguided = (
        call_plain(plain, replace(request, guidance_scale=scale)) for scale in (4.0, 1.0)
    )
    assert np.abs(levels(mixed.images[0]) - levels(guided[0])).max() > 1
    assert np.abs(levels(mixed.images[0]) - levels(unguided[0])).max() > 1

    def unguide(pipeline: Any, step: int, timestep: Any, values: Any) -> Any:
        if step == 1:
            pipeline._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
            pipeline.unet.register_forward_pre_hook(narrow, with_kwargs=True)
        return values

    def narrow(module: Any, args: Any, kwargs: Any) -> Any:
        embeddings = kwargs["added_cond_kwargs"]["image_embeds"]
        rows = len(args[0])
        return args, kwargs | {
            "added_cond_kwargs": {"image_embeds": [e[-rows:] for e in embeddings]}
        }

    try:
        expected = call_plain(
            plain,
            request,
            callback_on_step_end=unguide,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
    finally:
        plain.unet._forward_pre_hooks.clear()
        plain.unet._forward_pre_hooks_with_kwargs.clear()
    check_same(mixed, expected)


def test_other_tasks_take_references_too(served: PipelineRunner, plain: Any) -> None:
    request = a_request(
        task=Task.IMAGE_TO_IMAGE,
        images=(photo(9),),
        strength=0.8,
        num_inference_steps=5,
        references=(reference(1, 0.8),),
    )
    (inbox,) = submit_all(served, [request])
    other = StableDiffusionImg2ImgPipeline.from_pipe(plain)
    other.scheduler = default_scheduler()
    start = (
        Image.open(io.BytesIO(photo(9))).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    )
    check_same(finished(inbox), call_plain(other, request, image=start, strength=0.8))


def test_what_is_probed_has_references(model: LoadedModel) -> None:
    """So that rows are tried with what they will have, and bytes do not depend on the load."""
    runner = PipelineRunner(model, OPTIONS)
    runner.start()
    try:
        inputs = runner.capabilities().tasks[Task.TEXT_TO_IMAGE]
        assert inputs[Role.REFERENCE] == Count(0, 8)
        assert runner.capabilities().ip_adapters == NAMES
        assert not runner.prepared.plan.serial
        assert "unet.forward: parking > reference scales" in describe_wrappers(model.pipeline)
        among = [finished(inbox) for inbox in submit_all(runner, REQUESTS)]
        assert runner.capabilities().same_bytes
        for request, one in zip(REQUESTS, among, strict=True):
            (alone,) = submit_all(runner, [request])
            assert [i.data for i in finished(alone).images] == [i.data for i in one.images]
    finally:
        runner.stop()


def test_lora_adapters_and_references_go_together(
    model: LoadedModel, plain: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    lora = save_lora(tmp_path / "ink.safetensors", tiny_folder, seed=1)
    runner = PipelineRunner(model, OPTIONS, AdapterOptions(folder=tmp_path), UNTRIED)
    runner.start()
    try:
        request = a_request(references=(reference(1, 0.8),), adapters=uses(ink=0.9))
        made, without, alone = [
            finished(inbox)
            for inbox in submit_all(
                runner,
                [request, replace(request, id="2", adapters=()), a_request(id="3")],
            )
        ]
        check_same(without, call_plain(plain, request))
        copied = copy.deepcopy(plain)
        with_adapters(copied, [lora]).set_adapters("plain0", 0.9)
        check_same(made, call_plain(copied, request))
        assert alone.images
    finally:
        runner.stop()


def test_an_unreadable_reference_is_the_requests_fault(served: PipelineRunner) -> None:
    cut = replace(reference(1), image=photo(1)[:200])
    (inbox,) = submit_all(served, [a_request(references=(reference(1), cut))])
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.field == "references[1].image"


def test_compiled_code_takes_references(
    tiny_folder: Path, adapter_folders: Sequence[Path], plain: Any
) -> None:
    torch._dynamo.reset()
    model = load(tiny_folder, adapter_folders, speed=SpeedSettings(compile=True))
    sharing = SharingOptions(plan=SharingPlan(filled_rows=(4,)))
    runner = PipelineRunner(model, EngineOptions(max_rows=4, threads=1), sharing=sharing)
    runner.start()
    try:
        found = runner.compile("eager")
        assert (found.compilation, found.compilation_remark) == (Compilation.COMPILED, "")
        for inbox, request in zip(submit_all(runner, REQUESTS), REQUESTS, strict=True):
            check_same(finished(inbox), call_plain(plain, request))
    finally:
        runner.stop()
