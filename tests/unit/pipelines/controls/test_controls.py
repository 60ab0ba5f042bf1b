"""Controls on a real pipeline behind a real engine, compared with plain diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from stepserve.domain.events import Failed, Finished
from stepserve.domain.models import ControlKind
from stepserve.domain.requests import ControlUse, GenerationRequest
from stepserve.domain.tasks import Role, Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.controls.files import ControlOptions, ControlSource
from stepserve.pipelines.errors import ModelLoadError
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_controls import drawing, opened, png, save_controlnet, save_t2i_adapter
from tiny_model import NATIVE_PX, UNTRIED, a_request, submit_all

# Of 255.
BOUND = 2
VISIBLE = 20

Serve = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    save_controlnet(folder / "edges")
    save_controlnet(folder / "depth", seed=1)
    save_t2i_adapter(folder / "sketch")
    return folder


def options(networks: Path, **changes: Any) -> ControlOptions:
    named = {path.name: ControlSource(path) for path in sorted(networks.iterdir())}
    return ControlOptions(**({"named": named} | changes))


@pytest.fixture
def make(tiny: LoadedModel, networks: Path) -> Iterator[Callable[..., PipelineRunner]]:
    made: list[PipelineRunner] = []

    def make_runner(controls: ControlOptions | None = None) -> PipelineRunner:
        engine = EngineOptions(max_rows=32, max_pending_images=100)
        controls = controls or options(networks)
        made.append(PipelineRunner(tiny, engine, sharing=UNTRIED, controls=controls))
        made[-1].start()
        return made[-1]

    yield make_runner
    for runner in made:
        runner.stop()


def use(name: str, seed: int = 0, **changes: Any) -> ControlUse:
    return ControlUse(name, png(drawing(seed)), **changes)


def images_of(runner: PipelineRunner, requests: list[GenerationRequest]) -> list[Any]:
    outcomes = [inbox.wait() for inbox in submit_all(runner, requests)]
    for outcome in outcomes:
        assert isinstance(outcome, Finished), outcome
    return [opened(outcome.images[0].data) for outcome in outcomes]


def refusal(runner: PipelineRunner, request: GenerationRequest) -> str:
    (inbox,) = submit_all(runner, [request])
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    field = getattr(outcome.error, "field", None) or ""
    assert field.partition("[")[0] == "controls", outcome.error
    return str(outcome.error)


def plain(folder: Path, networks: Path, request: GenerationRequest) -> Any:
    """What diffusers' own class draws, called alone."""
    names = [one.name for one in request.controls]
    is_adapter = names[:1] == ["sketch"]
    kind: Any = T2IAdapter if is_adapter else ControlNetModel
    loaded = [kind.from_pretrained(networks / name) for name in names]
    cls: Any = {
        Task.TEXT_TO_IMAGE: StableDiffusionControlNetPipeline,
        Task.IMAGE_TO_IMAGE: StableDiffusionControlNetImg2ImgPipeline,
        Task.INPAINTING: StableDiffusionControlNetInpaintPipeline,
    }[request.task]
    cls = (
        StableDiffusionAdapterPipeline if is_adapter else cls if names else StableDiffusionPipeline
    )
    part = {} if not names else {"adapter" if is_adapter else "controlnet": loaded}
    part = {name: value[0] if len(value) == 1 else value for name, value in part.items()}
    pipeline = cls.from_pretrained(folder, **part)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"width": request.width, "height": request.height}
    controls = [drawing(int(one.name == "depth")) for one in request.controls]
    controls = [image.convert("L") for image in controls] if is_adapter else controls
    image = {"image": drawing(9), "strength": request.strength}
    one_or_all = (lambda values: values[0]) if len(names) == 1 else list
    if request.task is Task.INPAINTING:
        mask = drawing(9).convert("L").point(lambda value: 255 * (value > 127))
        image["mask_image"] = mask
    if names:
        own = "image" if request.task is Task.TEXT_TO_IMAGE else "control_image"
        arguments[own] = one_or_all(controls)
        scale = "adapter_conditioning_scale" if is_adapter else "controlnet_conditioning_scale"
        arguments[scale] = one_or_all([one.scale for one in request.controls])
    if names and not is_adapter:
        arguments["control_guidance_start"] = one_or_all([one.start for one in request.controls])
        arguments["control_guidance_end"] = one_or_all([one.end for one in request.controls])
    if request.task is not Task.TEXT_TO_IMAGE:
        arguments |= image
    drawn = pipeline(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=[torch.Generator().manual_seed(request.seed)],
        **arguments,
    )
    return np.asarray(drawn.images[0], dtype=np.int16)


def mixed() -> list[GenerationRequest]:
    """Every kind of control and task, with none among them."""
    mask = drawing(9).convert("L").point(lambda value: 255 * (value > 127))
    image = {"images": (png(drawing(9)),), "strength": 0.8, "num_inference_steps": 5}
    controls: list[tuple[tuple[ControlUse, ...], dict[str, Any]]] = [
        ((use("edges"),), {}),
        ((), {}),
        ((use("edges", scale=0.4),), {}),
        ((use("edges", scale=0.7), use("depth", 1, scale=0.6, start=0.3)), {}),
        ((use("depth", 1, end=0.5),), {"guidance_scale": 0.0}),
        ((use("sketch", scale=0.8),), {}),
        ((use("edges"),), {"task": Task.IMAGE_TO_IMAGE, **image}),
        ((use("edges"),), {"task": Task.INPAINTING, "mask": png(mask), **image}),
    ]
    return [
        a_request(id=str(i), seed=i, num_inference_steps=4, controls=used).__class__(
            **{**vars(a_request(id=str(i), seed=i, num_inference_steps=4, controls=used)), **more}
        )
        for i, (used, more) in enumerate(controls)
    ]


@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
def test_every_kind_of_control_at_once_gives_the_plain_images(
    make: Callable[..., PipelineRunner], tiny_folder: Path, networks: Path
) -> None:
    runner = make()
    requests = mixed()
    served = images_of(runner, requests)
    wanted = [plain(tiny_folder, networks, request) for request in requests]
    differences = [int(np.abs(a - b).max()) for a, b in zip(served, wanted, strict=True)]
    assert max(differences) <= BOUND, differences
    # Else a control that was mixed up, or ignored, would go unseen.
    bare = images_of(runner, [replace(requests[0], controls=())])[0]
    assert np.abs(bare - served[0]).max() > VISIBLE


def test_requests_with_and_without_control_share_forwards(
    make: Callable[..., PipelineRunner],
) -> None:
    runner = make()
    before = vars(runner.engine.counters).copy()
    same = [use("edges", scale=0.5), use("edges", 1, scale=1.2)]
    requests = [
        a_request(id=str(i), seed=i, num_inference_steps=8, controls=controls)
        for i, controls in enumerate([(same[0],), (), (same[1],), ()])
    ]
    images_of(runner, requests)
    after = vars(runner.engine.counters)
    calls, forwards = (after[name] - before[name] for name in ("calls", "forwards"))
    assert after["retries"] == 0
    # 32 steps and 16 of the ControlNet, beside text encoders and decodes: about 8 + 8 if in step.
    assert calls - forwards > 20


def test_networks_are_loaded_when_used_and_dropped_when_idle(
    make: Callable[..., PipelineRunner], networks: Path
) -> None:
    runner = make(options(networks, max_loaded=1))
    assert [control.loaded for control in runner.capabilities().controls] == [False] * 3
    assert runner.memory_bytes()["controls"] == 0
    images_of(runner, [a_request(controls=(use("edges"),))])
    told = {control.name: control for control in runner.capabilities().controls}
    assert told["edges"].loaded
    assert told["edges"].memory_bytes == runner.memory_bytes()["controls"] > 0
    images_of(runner, [a_request(controls=(use("depth"),))])
    loaded = {control.name: control.loaded for control in runner.capabilities().controls}
    assert loaded == {"depth": True, "edges": False, "sketch": False}
    # One that was dropped comes back.
    images_of(runner, [a_request(controls=(use("edges"),))])


def test_capabilities_tell_what_a_task_takes(make: Callable[..., PipelineRunner]) -> None:
    model = make().capabilities()
    kinds = {control.name: (control.kind, control.takes_interval) for control in model.controls}
    assert kinds == {
        "depth": (ControlKind.CONTROLNET, True),
        "edges": (ControlKind.CONTROLNET, True),
        "sketch": (ControlKind.T2I_ADAPTER, False),
    }
    for task in (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINTING):
        assert model.tasks[task][Role.CONTROL].most == 4


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (
            (use("edge"),),
            "'edge' is not known; did you mean 'edges'? (known: depth, edges, sketch)",
        ),
        ((use("edges", scale=11.0),), "controls[0].scale must be 0 to 10, got 11.0"),
        ((use("edges", scale=-1.0),), "must be 0 to 10, got -1.0"),
        ((use("edges", scale=float("nan")),), "must be 0 to 10, got nan"),
        ((use("edges", start=1.0),), "controls[0].start must be at least 0 and less than 1, got 1"),
        ((use("edges", start=0.5, end=0.5),), "controls[0].end must be over start (0.5)"),
        ((use("sketch", end=0.5),), "'sketch' is a t2i-adapter, which steers at every step"),
        ((use("edges", preprocessor="cany"),), "must be one of canny, grey, invert, tile, none"),
        ((use("edges"), use("sketch")), "are of different kinds"),
        ((use("edges"),) * 5, "controls must be 0 to 4 for text-to-image"),
    ],
)
def test_what_a_control_does_not_take_is_refused(
    make: Callable[..., PipelineRunner], controls: tuple[ControlUse, ...], message: str
) -> None:
    assert message in refusal(make(), a_request(controls=controls))


def test_a_model_without_controls_refuses_them(runner: PipelineRunner) -> None:
    told = refusal(runner, a_request(controls=(use("edges"),)))
    assert "controls must be left out: text-to-image with model 'tiny' does not take one" in told


def test_a_task_that_a_kind_cannot_do_is_refused(make: Callable[..., PipelineRunner]) -> None:
    image = {"task": Task.IMAGE_TO_IMAGE, "images": (png(drawing()),), "strength": 0.8}
    told = refusal(make(), a_request(controls=(use("sketch"),), **image))
    assert "'sketch' is a t2i-adapter, with which this model does text-to-image" in told


def broken(networks: Path, tmp_path: Path, what: str) -> Path:
    folder = Path(shutil.copytree(networks / "edges", tmp_path / "edges"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    if what == "another model":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 768}))
    if what == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    if what == "no weights":
        weights.unlink()
    if what == "no config":
        (folder / "config.json").unlink()
    if what == "another class":
        (folder / "config.json").write_text(json.dumps({"_class_name": "SD3ControlNetModel"}))
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another model", "made for another model: its cross_attention_dim is 768, and this"),
        ("cut short", "diffusion_pytorch_model.safetensors is not a whole safetensors file"),
        ("no weights", "holds no .safetensors files"),
        ("no config", "holds no config.json that can be read"),
        ("nothing", "its folder does not exist"),
        ("another class", "is a SD3ControlNetModel, and a StableDiffusionPipeline takes: Control"),
    ],
)
def test_a_network_that_cannot_be_used_is_told(
    make: Callable[..., PipelineRunner],
    networks: Path,
    tmp_path: Path,
    what: str,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "gone" if what == "nothing" else broken(networks, tmp_path, what)
    runner = make(ControlOptions({"edges": ControlSource(folder)}))
    # To the operator at start, with the path, and to clients without.
    assert message in caplog.text
    assert f"controls.edges, path {folder}" in caplog.text
    [listed] = runner.capabilities().controls
    assert message in listed.problem
    told = refusal(runner, a_request(controls=(use("edges"),)))
    assert "'edges' cannot be used" in told
    assert message in told
    assert str(tmp_path) not in told


def test_weights_that_are_no_numbers_are_refused(
    make: Callable[..., PipelineRunner], networks: Path, tmp_path: Path
) -> None:
    network = ControlNetModel.from_pretrained(networks / "edges")
    network.conv_in.bias.data[0] = float("nan")
    network.save_pretrained(tmp_path / "edges")
    runner = make(ControlOptions({"edges": ControlSource(tmp_path / "edges")}))
    for _ in range(2):
        assert "its weights" in refusal(runner, a_request(controls=(use("edges"),)))


def test_a_pipeline_that_takes_none_is_not_loaded_with_controls(
    tiny: LoadedModel, networks: Path
) -> None:
    class OtherPipeline(type(tiny.pipeline)):  # type: ignore[misc]
        pass

    other = OtherPipeline(**tiny.pipeline.components, requires_safety_checker=False)
    with pytest.raises(ModelLoadError, match="none are served with a OtherPipeline"):
        PipelineRunner(replace(tiny, pipeline=other), controls=options(networks))


def test_control_images_get_the_size_of_the_request(
    make: Callable[..., PipelineRunner], tiny_folder: Path, networks: Path
) -> None:
    request = a_request(width=NATIVE_PX * 2, num_inference_steps=2, controls=(use("edges"),))
    image = images_of(make(), [request])[0]
    assert image.shape == (NATIVE_PX, NATIVE_PX * 2, 3)
