"""LoRA adapters on real pipelines behind a real engine, compared with plain diffusers."""

from __future__ import annotations

import math
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stepserve.domain.errors import GenerationFailedError, InvalidRequestError
from stepserve.domain.events import Failed, Finished
from stepserve.domain.guidance import CLASSIC
from stepserve.domain.models import AdapterSharing
from stepserve.domain.requests import AdapterUse, GenerationRequest, RequestKey
from stepserve.domain.timings import Timings
from stepserve.engine.loop.engine import EngineOptions
from stepserve.engine.tracks.track import Phase, Track
from stepserve.pipelines.adapters.cache import AdapterCache
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import LoadedModel, ModelLoadError
from stepserve.pipelines.serving.preparation import DEFAULT_SHARING, SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_adapters import (
    ATTENTION,
    CONVOLUTIONS,
    TEXT,
    call_plain,
    load_plain,
    save_adapter,
    uses,
    with_adapters,
)
from tiny_model import UNTRIED, Inbox, a_request, pixels

# Seen: 4e-6 on Intel, on AMD 1.1e-4 at single pixels (median 3e-6). Adapters differ by over 0.1.
FLOAT32_BOUND = 2e-4
VISIBLE = 1e-2
PATIENCE_S = 60
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "v1.5": {"rank": 2, "alpha": 2},
    "text": {"text_encoder": TEXT},
    "only-text": {"unet": (), "text_encoder": TEXT},
    "conv": {"unet": (*ATTENTION, *CONVOLUTIONS)},
}


@pytest.fixture(scope="session")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter of each kind. Tests copy it."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, kind) in enumerate(KINDS.items()):
        save_adapter(folder / f"{name}.safetensors", tiny_folder, seed, **kind)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapters"))


Make = Callable[..., PipelineRunner]


@pytest.fixture
def make(tiny: LoadedModel, folder: Path) -> Iterator[Make]:
    runners = []

    def make_runner(sharing: SharingOptions = UNTRIED, **options: Any) -> PipelineRunner:
        adapters = AdapterOptions(**({"folder": folder} | options))
        engine = EngineOptions(max_rows=32, max_pending_images=100)
        runners.append(PipelineRunner(tiny, engine, adapters, sharing))
        return runners[-1]

    yield make_runner
    for runner in runners:
        runner.stop()


class Reference:
    """Plain diffusers, with the same adapters loaded the plain way."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self.bare = load_plain(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pipeline = with_adapters(load_plain(model), self.files)

    def __call__(self, request: GenerationRequest) -> torch.Tensor:
        if not request.adapters:
            return call_plain(self.bare, request)
        names = [path.stem for path in self.files]
        used = sorted(request.adapters, key=lambda use: use.name)
        self.pipeline.set_adapters(
            [f"plain{names.index(use.name)}" for use in used], [use.scale for use in used]
        )
        return call_plain(self.pipeline, request)


@pytest.fixture(scope="session")
def reference(tiny_folder: Path, made: Path) -> Reference:
    return Reference(tiny_folder, made)


class Waiting:
    """An engine listener that a test waits on."""

    def __init__(self) -> None:
        self.inbox = Inbox()

    def accepted(self, position: int, backlog_s: float) -> None:
        pass

    def started(self) -> None:
        pass

    def finished(self, result: torch.Tensor, timings: Timings) -> None:
        self.result = result
        self.inbox(Finished("", (), timings))

    def failed(self, error: BaseException, timings: Timings) -> None:
        self.inbox(Failed("", error))  # type: ignore[arg-type]

    def wait(self) -> torch.Tensor:
        outcome = self.inbox.wait()
        if isinstance(outcome, Failed):
            raise outcome.error
        return self.result


def submit_for_tensors(runner: PipelineRunner, request: GenerationRequest) -> Waiting:
    """Through adapter cache and engine: the outcome is images before they are rounded to bytes."""
    adapter_cache, waiting = runner.adapters, Waiting()
    variant = adapter_cache.resolve(request.adapters)

    def run() -> torch.Tensor:
        copied = runner.model.factory.copy(request.scheduler)
        return adapter_cache.run_with(variant, lambda: call_plain(copied, request))

    track = Track(
        request.id,
        CLASSIC.rows_of(request),
        (Phase(4),),
        request.n,
        run,
        waiting,
        variant=variant,
        can_mix=partial(adapter_cache.can_mix, variant),
    )
    runner.engine.submit(track)
    return waiting


def serve_together(runner: PipelineRunner, requests: list[GenerationRequest]) -> list[torch.Tensor]:
    """All are queued before the engine starts, so that they go in step."""
    waiting = [submit_for_tensors(runner, request) for request in requests]
    runner.start()
    return [one.wait() for one in waiting]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def requests_with(*adapters: tuple[AdapterUse, ...], **changes: Any) -> list[GenerationRequest]:
    changes = {"num_inference_steps": 4} | changes
    return [
        a_request(id=str(index), seed=10 * index, adapters=used, **changes)
        for index, used in enumerate(adapters)
    ]


def use(name: str, scale: float = 1.0) -> tuple[AdapterUse, ...]:
    return (AdapterUse(name, scale),)


BOTH = (*use("plain", 0.7), *use("conv", 0.4))
MIXED = [
    use("plain"),
    (),
    use("plain", 0.5),
    BOTH,
    use("plain"),
    BOTH[::-1],
    use("v1.5", -1.0),
    (),
    use("text"),
    use("text", 0.5),
    use("only-text"),
]


class ForwardLog:
    """How many rows every forward of the UNet had, and what was applied to all of them by PEFT.

    Without those of the probes that come before the first request.
    """

    def __init__(self, runner: PipelineRunner) -> None:
        self.seen: list[tuple[tuple[tuple[str, float], ...], int]] = []
        self._adapter_cache = runner.adapters
        unet = runner.model.pipeline.unet
        self._block = unet.mid_block
        self._handle = self._block.register_forward_pre_hook(self._log)

    def _log(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if not self._adapter_cache._users:
            return
        layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        names = {name: file.name for file, name in self._adapter_cache._loaded.items()}
        active = {
            (names[name], layer.scaling[name] / (layer.lora_alpha[name] / layer.r[name]))
            for layer in layers
            for name in layer.active_adapters
            if name in layer.scaling
        }
        self.seen.append((tuple(sorted(active)), args[0].shape[0]))

    def remove(self) -> None:
        self._handle.remove()


def test_every_request_gets_the_image_of_plain_diffusers(make: Make, reference: Reference) -> None:
    requests = requests_with(*MIXED)
    served = serve_together(make(max_loaded=5), requests)
    wanted = [reference(request) for request in requests]
    for request, one, other in zip(requests, served, wanted, strict=True):
        assert difference(one, other) < FLOAT32_BOUND, request.adapters


def test_the_adapters_can_be_seen(reference: Reference) -> None:
    """Else a mix-up would go unseen."""
    sets = [MIXED[index] for index in (0, 1, 2, 3, 6, 8, 9, 10)]
    images = [reference(a_request(seed=0, adapters=used)) for used in sets]
    for index, one in enumerate(images):
        for other in images[:index]:
            assert difference(one, other) > VISIBLE


def test_requests_share_forwards_whatever_their_adapters(make: Make) -> None:
    sets = [use("plain"), (), use("plain", 0.5), use("v1.5"), (*use("v1.5"), *use("plain", 0.3))]
    runner = make()
    log = ForwardLog(runner)
    serve_together(runner, requests_with(*sets))
    log.remove()
    # Guidance makes two rows of each request.
    assert log.seen == [((), 10)] * 4
    assert runner.engine.counters.retries == 0


def test_an_adapter_that_cannot_be_mixed_shares_forwards_with_its_equals_only(
    make: Make, folder: Path, tiny_folder: Path
) -> None:
    save_adapter(folder / "dora.safetensors", tiny_folder, seed=9, dora=True)
    sets = [use("dora"), (), use("dora", 0.5), use("plain"), (*use("dora"), *use("plain"))]
    runner = make()
    log = ForwardLog(runner)
    serve_together(runner, requests_with(*sets, *sets))
    log.remove()
    assert Counter(log.seen) == {
        ((("dora", 1.0),), 4): 4,
        ((), 8): 4,
        ((("dora", 0.5),), 4): 4,
        ((("dora", 1.0), ("plain", 1.0)), 4): 4,
    }
    assert runner.engine.counters.retries == 0
    told = {adapter.name: adapter for adapter in runner.capabilities().adapter_sharing}
    assert told["plain"] == AdapterSharing("plain", shares=True)
    assert told["conv"] == AdapterSharing("conv", shares=None)
    assert told["dora"].shares is False
    assert (
        "has more than two factors (lora_A.weight, lora_B.weight, lora_mag" in told["dora"].reason
    )


def test_requests_without_adapters_are_those_of_a_model_that_never_had_any(
    make: Make, tiny: LoadedModel
) -> None:
    bare = requests_with((), (), guidance_scale=3.0)
    # They share forwards with others, so that there have to be row counts that keep their bits.
    never = PipelineRunner(tiny, EngineOptions(max_rows=32))
    untouched = serve_together(never, bare)
    never.stop()
    others = requests_with(*MIXED, guidance_scale=3.0)
    for index, request in enumerate(others):
        object.__setattr__(request, "id", f"other-{index}")
    others = [request for request in others if request.adapters]
    served = serve_together(make(DEFAULT_SHARING, max_loaded=5), bare + others)
    assert torch.equal(served[0], untouched[0])
    assert torch.equal(served[1], untouched[1])


def test_stopping_takes_every_layer_off_again(make: Make, tiny: LoadedModel) -> None:
    modules = {name: type(module) for name, module in tiny.pipeline.unet.named_modules()}
    weights = {name: value.data_ptr() for name, value in tiny.pipeline.unet.named_parameters()}
    runner = make()
    serve_together(runner, requests_with(use("conv"), use("text")))
    assert any(isinstance(m, BaseTunerLayer) for m in tiny.pipeline.unet.modules())
    runner.stop()
    assert {n: type(m) for n, m in tiny.pipeline.unet.named_modules()} == modules
    after = {name: value.data_ptr() for name, value in tiny.pipeline.unet.named_parameters()}
    assert after == weights
    assert not any(isinstance(m, BaseTunerLayer) for m in tiny.pipeline.text_encoder.modules())


def test_the_least_recently_used_goes_first(make: Make) -> None:
    runner = make(max_loaded=2)
    runner.start()
    for name, loaded in (
        ("plain", ("plain",)),
        ("v1.5", ("plain", "v1.5")),
        ("plain", ("v1.5", "plain")),
        ("text", ("plain", "text")),
        ("conv", ("text", "conv")),
    ):
        submit_for_tensors(runner, a_request(adapters=use(name))).wait()
        # The listener hears the end after the pipeline call gave its adapters back.
        assert runner.adapters.loaded == loaded


def test_what_adapters_take_is_told(make: Make, folder: Path) -> None:
    adapted = make(max_loaded=1)
    adapted.start()
    assert adapted.memory_bytes()["adapters"] == 0
    for name in ("plain", "conv"):
        drawn_image(adapted, AdapterUse(name))
        file_bytes = (folder / f"{name}.safetensors").stat().st_size
        stacked_bytes = adapted.adapters.stacked_bytes()
        assert stacked_bytes > 0
        assert adapted.memory_bytes()["adapters"] == file_bytes + stacked_bytes
    adapted.stop()
    assert adapted.memory_bytes()["adapters"] == 0


def test_more_adapters_than_fit_under_concurrent_use(make: Make, reference: Reference) -> None:
    chance = random.Random(0)
    names = list(KINDS)
    sets = []
    for _ in range(30):
        chosen = chance.sample(names, chance.choice((0, 1, 1, 2)))
        sets.append(tuple(AdapterUse(name, chance.choice((0.5, 1.0))) for name in chosen))
    requests = requests_with(*sets, num_inference_steps=2, guidance_scale=1.0)
    runner = make(max_loaded=2)
    served = serve_together(runner, requests)
    for request, one in zip(requests, served, strict=True):
        assert difference(one, reference(request)) < FLOAT32_BOUND, request.adapters
    assert len(runner.adapters.loaded) == 2
    layers = [m for m in runner.model.pipeline.unet.modules() if isinstance(m, BaseTunerLayer)]
    assert max(len(layer.scaling) for layer in layers) <= 2


def ask(runner: PipelineRunner, request: GenerationRequest) -> tuple[Inbox, Finished | Failed]:
    inbox = Inbox()
    runner.submit(request, inbox)
    return inbox, inbox.wait()


def drawn_image(runner: PipelineRunner, *adapters: AdapterUse) -> bytes:
    _, outcome = ask(runner, a_request(adapters=adapters))
    assert isinstance(outcome, Finished), outcome
    return pixels(outcome.images[0].data)


def refusal(runner: PipelineRunner, *adapters: AdapterUse) -> tuple[list[str], str]:
    """What came, and the message; it must be the caller's to mend."""
    inbox, outcome = ask(runner, a_request(adapters=adapters))
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.field == "adapters"
    return inbox.kinds, outcome.error.message


def test_an_adapter_added_while_serving_is_found(
    make: Make, folder: Path, tmp_path: Path, reference: Reference
) -> None:
    aside = (folder / "plain.safetensors").rename(tmp_path / "aside")
    runner = make()
    runner.start()
    bare = drawn_image(runner)
    assert "plain" not in runner.capabilities().adapters
    refusal(runner, AdapterUse("plain"))
    aside.rename(folder / "plain.safetensors")
    assert "plain" in runner.capabilities().adapters
    assert drawn_image(runner, AdapterUse("plain")) != bare
    served = submit_for_tensors(runner, a_request(adapters=use("plain"))).wait()
    assert difference(served, reference(a_request(adapters=use("plain")))) < FLOAT32_BOUND


def test_a_replaced_file_is_another_adapter(make: Make, folder: Path) -> None:
    runner = make()
    runner.start()
    before, other = (drawn_image(runner, AdapterUse(name)) for name in ("plain", "conv"))
    shutil.copy(folder / "conv.safetensors", folder / "plain.safetensors")
    assert drawn_image(runner, AdapterUse("plain")) == other != before


def test_a_file_replaced_while_its_request_waits_is_told(make: Make, folder: Path) -> None:
    runner, inbox = make(), Inbox()
    runner.submit(a_request(adapters=use("plain")), inbox)
    shutil.copy(folder / "conv.safetensors", folder / "plain.safetensors")
    runner.start()
    outcome = inbox.wait()
    assert isinstance(outcome, Failed)
    assert "was replaced meanwhile; send the request again" in outcome.error.message
    assert drawn_image(runner, AdapterUse("plain")) == drawn_image(runner, AdapterUse("conv"))


def test_an_unknown_name_is_refused_before_work(make: Make) -> None:
    runner = make()
    runner.start()
    kinds, message = refusal(runner, AdapterUse("plane"))
    assert kinds == ["Failed"]
    assert message == (
        "adapters: 'plane' is not known; did you mean 'plain'? "
        "(known: conv, only-text, plain, text, v1.5)"
    )


def test_names_are_no_paths(make: Make, folder: Path) -> None:
    runner = make(folder=folder / "inner")
    runner.start()
    assert runner.capabilities().adapters == ()
    for name in ("../plain", str(folder / "plain"), str(folder / "plain.safetensors")):
        assert "is not known" in refusal(runner, AdapterUse(name))[1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def rename_tensors(path: Path, old: str, new: str) -> None:
    save_file({n.replace(old, new): t for n, t in load_file(path).items()}, path)


def add_tensor(path: Path, name: str) -> None:
    save_file(load_file(path) | {name: torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (cut, "it is not a whole safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a pickle"), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "it is not a whole safetensors file"),
        (lambda path: save_file({}, path), "it holds no tensors"),
        (
            lambda path: add_tensor(path, "unet.conv_norm_out.weight"),
            "its tensor 'unet.conv_norm_out.weight' is none of a LoRA adapter",
        ),
        (lambda path: add_tensor(path, "unet.x.dora_scale"), "it is a DoRA adapter"),
        (lambda path: add_tensor(path, "unet.x.lora_A.weight"), "it lacks the other factor of"),
        (lambda path: rename_tensors(path, "lora_A", "lora_C"), "is none of a LoRA adapter"),
    ],
    ids=["cut", "pickle", "empty", "no tensors", "base", "dora", "half", "unknown factor"],
)
def test_a_broken_file_is_refused_before_work(
    make: Make, folder: Path, break_it: Callable[[Path], None], reason: str
) -> None:
    break_it(folder / "plain.safetensors")
    runner = make()
    runner.start()
    kinds, message = refusal(runner, AdapterUse("plain"))
    assert kinds == ["Failed"]
    assert message.startswith("adapters: 'plain' cannot be used: ")
    assert reason in message
    assert str(folder) not in message


def resize_a_factor(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: torch.zeros(tensors[name].shape[0], 7)}, path)


def claim_other_layers(path: Path) -> None:
    """Text encoder layers are found by the names in the file's metadata."""
    shutil.copy(path.with_stem("text"), path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: t for name, t in load_file(path).items() if "fc1" not in name}
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (
            lambda path: rename_tensors(path, "unet.mid_block", "unet.middle"),
            "the model has no layer for unet.middle",
        ),
        (
            lambda path: rename_tensors(path, "unet.", "transformer."),
            "the model has no transformer that takes adapters",
        ),
        (resize_a_factor, "lora_A.weight do not fit together"),
        (claim_other_layers, "tensors for"),
    ],
    ids=["layer", "component", "rank", "claims"],
)
def test_a_file_that_cannot_be_loaded_ends_its_own_request(
    make: Make,
    folder: Path,
    reference: Reference,
    break_it: Callable[[Path], None],
    reason: str,
) -> None:
    break_it(folder / "plain.safetensors")
    runner = make()
    broken, others = Inbox(), requests_with(use("conv"), (), use("text"))
    waiting = [submit_for_tensors(runner, request) for request in others]
    runner.submit(a_request(id="broken", adapters=use("plain")), broken)
    runner.start()
    outcome = broken.wait()
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert reason in outcome.error.message
    assert str(folder) not in outcome.error.message
    for request, one in zip(others, waiting, strict=True):
        assert difference(one.wait(), reference(request)) < FLOAT32_BOUND
    # Once is enough to know.
    assert refusal(runner, AdapterUse("plain")) == (["Failed"], outcome.error.message)


def test_what_is_wrong_with_a_file_is_logged_in_one_line(
    make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "plain.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(path).items()}, path)
    runner = make()
    runner.start()
    assert "NaN" in refusal(runner, AdapterUse("plain"))[1]
    (record,) = (record for record in caplog.records if "cannot be loaded" in record.message)
    assert record.exc_info is None
    assert "holds numbers that are NaN or infinite" in record.message


def test_a_load_that_fails_half_way_leaves_nothing_behind(
    make: Make, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make()
    pipeline = runner.model.pipeline
    monkeypatch.setattr(pipeline, "load_lora_into_text_encoder", lambda *args, **kwargs: 1 / 0)
    runner.start()
    message = refusal(runner, AdapterUse("plain"))[1]
    assert message == (
        "adapters: 'plain' cannot be used: it does not fit this model; the server's log says more"
    )
    assert runner.adapters.loaded == ()
    layers = [m for m in pipeline.unet.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert all(len(layer.scaling) == 0 for layer in layers)
    monkeypatch.undo()
    for request in requests_with((), use("text")):
        served = submit_for_tensors(runner, request).wait()
        assert difference(served, reference(request)) < FLOAT32_BOUND


def test_no_memory_for_an_adapter_is_no_fault_of_its_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    runner = make()
    monkeypatch.setattr(runner.model.pipeline, "load_lora_weights", fail)
    runner.start()
    _, outcome = ask(runner, a_request(adapters=use("plain")))
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, GenerationFailedError)
    monkeypatch.undo()
    drawn_image(runner, AdapterUse("plain"))


def test_an_adapter_of_another_model_is_told_by_its_sizes(
    make: Make, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "plain.safetensors")
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    width = tensors[name].shape[1]
    wide = tensors | {name: torch.zeros(tensors[name].shape[0], 2 * width)}
    save_file(wide, folder / "plain.safetensors")
    runner = make()
    runner.start()
    assert refusal(runner, AdapterUse("plain"))[1] == (
        f"adapters: 'plain' cannot be used: {name} is for {2 * width} features "
        f"and the model's layer has {width}"
    )


def test_a_cancelled_request_gives_its_adapters_back(make: Make) -> None:
    runner = make(max_loaded=1)
    runner.start()
    inbox = Inbox()

    def cancel_when_started(event: Any) -> None:
        inbox(event)
        if len(inbox.events) == 3:
            runner.cancel(RequestKey("r"))

    runner.submit(a_request(adapters=use("plain"), num_inference_steps=900), cancel_when_started)
    assert isinstance(inbox.wait(), Failed)
    drawn_image(runner, AdapterUse("conv"))
    assert runner.adapters.loaded == ("conv",)
    assert not runner.adapters._users


def test_named_adapters_may_be_folders(make: Make, folder: Path, made: Path) -> None:
    alone = folder / "alone"
    alone.mkdir()
    shutil.copy(made / "plain.safetensors", alone / "weights.safetensors")
    preferred = folder / "preferred"
    preferred.mkdir()
    shutil.copy(made / "plain.safetensors", preferred / "pytorch_lora_weights.safetensors")
    shutil.copy(made / "conv.safetensors", preferred / "another.safetensors")
    named = {
        "alone": alone,
        "preferred": preferred,
        "file": made / "plain.safetensors",
        "many": made,
        "missing": folder / "missing.safetensors",
        "pickle": folder / "weights.bin",
    }
    runner = make(folder=None, named=named)
    runner.start()
    assert runner.capabilities().adapters == tuple(sorted(named))
    one, two, three = (drawn_image(runner, AdapterUse(n)) for n in ("alone", "preferred", "file"))
    assert one == two == three
    assert "holds 5 .safetensors files" in refusal(runner, AdapterUse("many"))[1]
    assert "No such file" in refusal(runner, AdapterUse("missing"))[1]
    assert "only .safetensors files" in refusal(runner, AdapterUse("pickle"))[1]


def test_a_model_without_adapters_takes_none(runner: PipelineRunner) -> None:
    assert runner.capabilities().max_adapters == 0
    told = "adapters: model 'tiny' has none, got 'plain'; leave them out"
    assert refusal(runner, AdapterUse("plain"))[1] == told


def test_a_pipeline_that_takes_no_adapters_is_told_at_once(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="no adapters into a SimpleNamespace"):
        AdapterCache(SimpleNamespace(unet=torch.nn.Linear(1, 1)), AdapterOptions(folder=folder))
    offloaded = torch.nn.Linear(1, 1)
    offloaded._hf_hook = object()  # type: ignore[assignment]
    pipeline = SimpleNamespace(unet=offloaded, _lora_loadable_modules=["unet", "text_encoder"])
    with pytest.raises(ModelLoadError, match="CPU offload"):
        AdapterCache(pipeline, AdapterOptions(folder=folder))
    assert AdapterCache(pipeline, AdapterOptions()).names() == ()


def test_setting_what_is_set_already_writes_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make()
    adapter_cache = runner.adapters
    variant = adapter_cache.resolve(uses(plain=0.5, conv=1.0))
    enter = adapter_cache.enter()["unet"]

    def alternate() -> None:
        layers = [m for m in runner.model.pipeline.unet.modules() if isinstance(m, BaseTunerLayer)]
        writes: list[str] = []
        for layer in layers:
            monkeypatch.setattr(layer, "set_scale", lambda name, scale: writes.append(name))
        enter([(variant, 2)])
        assert len(writes) >= len(layers)
        writes.clear()
        for other in (None, variant, variant, None, variant):
            enter([(other, 2)])
            wanted = [] if other is None else [adapter_cache._loaded[used.file] for used in other]
            assert all(layer.active_adapters == wanted for layer in layers)
        assert writes == []

    adapter_cache.run_with(variant, alternate)
