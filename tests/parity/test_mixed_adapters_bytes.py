"""The embedded model: bytes of requests with adapters do not depend on who shares forwards."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from adapter_writers import diffusers_saved, kohya, make_factors
from parity_cases import call_plain, load_reference
from PIL import Image
from safetensors.torch import save_file
from stepserve.domain.events import Finished
from stepserve.domain.requests import AdapterUse, GenerationRequest
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import load_model
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_adapters import uses, with_adapters
from tiny_model import submit_all

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
CONVOLUTIONS = ("conv_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_out")
# Visible, and small enough that images stay images.
STRENGTH = 0.05
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

NAMES = ("convolutions", "eight", "four", "sixteen", "small", "text")
SETS: tuple[tuple[AdapterUse, ...], ...] = (
    uses(eight=1.0),
    uses(four=0.5),
    (),
    uses(sixteen=-1.0),
    uses(eight=0.3, four=0.9),
    uses(convolutions=0.7),
    uses(small=1.0),
    uses(convolutions=-0.5, sixteen=0.25, small=0.6),
    uses(text=0.8),
    (),
    uses(eight=0.7),
    uses(text=1.0, eight=0.5),
)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapters")
    plain = load_reference(model_folder, "float32")
    for seed, (name, rank) in enumerate({"eight": 8, "four": 4, "sixteen": 16, "small": 2}.items()):
        factors = make_factors(plain.unet, ATTENTION, seed, (rank,), STRENGTH)
        save_file(diffusers_saved({"unet": factors}), made / f"{name}.safetensors")
    all_kinds = make_factors(plain.unet, (*ATTENTION[:4], *CONVOLUTIONS), 7, (4,), STRENGTH)
    tensors = kohya({"unet": all_kinds}, alpha=lambda path, rank: 2.0)
    save_file(tensors, made / "convolutions.safetensors")
    unet = make_factors(plain.unet, ("to_k", "to_v"), 8, (4,), STRENGTH)
    text = make_factors(plain.text_encoder, ("q_proj", "v_proj"), 9, (4,), STRENGTH)
    parts = {"unet": unet, "text_encoder": text}
    save_file(diffusers_saved(parts), made / "text.safetensors")
    return made


@pytest.fixture(scope="module")
def start(model_folder: Path, folder: Path) -> Iterator[Callable[[str], PipelineRunner]]:
    """An engine as it is served, which finds out by itself how rows keep their bits.

    One for each dtype, for all tests: starting it takes longest.
    """
    started: list[PipelineRunner] = []

    @cache
    def start_one(dtype: str) -> PipelineRunner:
        model = load_model("emoji", model_folder, dtype, "cpu")
        engine = EngineOptions(max_rows=32, max_pending_images=100)
        adapters = AdapterOptions(folder=folder, max_loaded=8)
        started.append(PipelineRunner(model, engine, adapters))
        started[-1].start()
        return started[-1]

    yield start_one
    for runner in started:
        runner.stop()


@pytest.fixture(scope="module")
def runner(start: Callable[[str], PipelineRunner]) -> PipelineRunner:
    return start("bfloat16")


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=str(index),
            model="emoji",
            prompt=("red heart", "smiling cat face", "pizza")[index % 3],
            width=64,
            height=64,
            num_inference_steps=4 + index % 3,
            guidance_scale=(4.0, 1.0, 6.0)[index % 3],
            seed=50 + 10 * index,
            scheduler=("DDIMScheduler", "EulerDiscreteScheduler")[index % 2],
            n=1 + index % 2,
            adapters=adapters,
        )
        for index, adapters in enumerate(SETS)
    ]


def files_of(runner: PipelineRunner, asked: Sequence[GenerationRequest]) -> list[list[bytes]]:
    outcomes = [inbox.wait() for inbox in submit_all(runner, asked)]
    for outcome in outcomes:
        assert isinstance(outcome, Finished), outcome
    return [[image.data for image in outcome.images] for outcome in outcomes]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_are_those_of_each_request_alone(
    start: Callable[[str], PipelineRunner], dtype: str, say: Callable[[str], None]
) -> None:
    """Wherever the model keeps them without adapters; in float32 rows are filled up for that."""
    runner, asked = start(dtype), requests()
    together = files_of(runner, asked)
    alone = [files_of(runner, [request])[0] for request in asked]
    kept = [one == other for one, other in zip(together, alone, strict=True)]
    say(f"{dtype}: {sum(kept)} of {len(kept)} requests have the same bytes alone and beside others")
    assert runner.adapters.can_mix(None)
    assert runner.adapters.separate() == ()
    assert all(kept) or not runner.capabilities().same_bytes


def test_bytes_are_those_of_plain_diffusers(
    runner: PipelineRunner, model_folder: Path, folder: Path, batch_invariant: bool
) -> None:
    asked = requests()
    served = files_of(runner, asked)
    bare = load_reference(model_folder, "bfloat16")
    adapted = with_adapters(
        load_reference(model_folder, "bfloat16"), [folder / f"{n}.safetensors" for n in NAMES]
    )
    for request, files in zip(asked, served, strict=True):
        wanted = plain_pixels(adapted if request.adapters else bare, request)
        if batch_invariant:
            assert [pixels_of(file) for file in files] == wanted, request.adapters


def plain_pixels(pipeline: Any, request: GenerationRequest) -> list[bytes]:
    used = sorted(request.adapters, key=lambda use: use.name)
    if used:
        names = [f"plain{NAMES.index(use.name)}" for use in used]
        pipeline.set_adapters(names, [use.scale for use in used])
    return [image.convert("RGB").tobytes() for image in call_plain(pipeline, request)]


def pixels_of(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


def test_requests_without_adapters_are_those_of_a_model_that_never_had_any(
    runner: PipelineRunner, model_folder: Path, serve: Callable[..., Any], batch_invariant: bool
) -> None:
    never, _ = serve("bfloat16")
    bare = [request for request in requests() if not request.adapters]
    wanted = files_of(never, bare)
    together = files_of(runner, [*bare, *(r for r in requests() if r.adapters)])
    if batch_invariant:
        assert together[: len(bare)] == wanted


def test_the_adapters_can_be_seen(runner: PipelineRunner) -> None:
    """Else a mix-up would go unseen."""
    one = requests()[0]
    sets = dict.fromkeys(SETS)
    asked = [replace(one, id=str(index), adapters=used) for index, used in enumerate(sets)]
    files = [files[0] for files in files_of(runner, asked)]
    assert len(set(files)) == len(files)
