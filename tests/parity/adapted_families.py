"""A tiny model of a family with a folder of LoRA files: served, and as plain diffusers has it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from families.family import Family, Variation
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from served_families.service import save_sized
from stepserve.domain.requests import AdapterUse, GenerationRequest
from stepserve.domain.timings import Timings
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import DTYPES, load_model
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.requests.input_decoding import Inputs
from stepserve.pipelines.schedulers.watch import watch_steps
from stepserve.pipelines.serving.listener import track_of
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from torch import Tensor, nn

MODEL = "adapted"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PATIENCE_S = 240
# Requests share as they come: what is looked at is that they may.
AS_THEY_COME = SharingOptions(plan=SharingPlan())
Uses = tuple[AdapterUse, ...]
Tensors = Callable[[Any], Mapping[str, Tensor]]
"""Of a file in another layout, for a pipeline."""


@dataclass(frozen=True)
class Kind:
    """A LoRA file to write.

    Args:
        layers: of the denoiser, by the ends of their names; empty for every linear layer and
            convolution.
        rank: of each layer.
        alpha: which is divided by the rank.
        ranks: of layers by name, where they are others.
        text: layers of the text encoder, likewise; empty for none.
        dora: whether it also says how large the weights become.
    """

    layers: Sequence[str] = ATTENTION
    rank: int = 4
    alpha: float = 4
    ranks: Mapping[str, int] = field(default_factory=dict)
    text: Sequence[str] = ()
    dora: bool = False


def save_adapter(pipeline: Any, path: Path, kind: Kind | Tensors, seed: int) -> None:
    """Write a file as diffusers' training scripts do, from a pipeline that is not used again."""
    if not isinstance(kind, Kind):
        save_file(dict(kind(pipeline)), path)
        return
    parts = {denoiser_name(pipeline): kind.layers, "text_encoder": kind.text}
    modules = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, layers in parts.items():
            module: Any = getattr(pipeline, name, None)
            if name != "text_encoder" or layers:
                module.add_adapter(_config(module, kind, layers))
                modules[name] = module
    weights = {f"{name}_lora_layers": _weights(module) for name, module in modules.items()}
    type(pipeline).save_lora_weights(
        path.parent, weight_name=path.name, **weights, **_collate_lora_metadata(modules)
    )


def denoiser_name(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def _config(module: nn.Module, kind: Kind, layers: Sequence[str]) -> LoraConfig:
    return LoraConfig(
        r=kind.rank,
        lora_alpha=kind.alpha,
        target_modules=list(layers) or adaptable_layers(module),
        rank_pattern=dict(kind.ranks),
        init_lora_weights=False,
        use_dora=kind.dora,
    )


def adaptable_layers(module: nn.Module) -> list[str]:
    """Every linear layer and convolution."""
    return [
        name
        for name, inner in module.named_modules()
        if isinstance(inner, nn.Linear | nn.Conv2d) and name
    ]


def _weights(module: Any) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(module)
    return {name: tensor * (2.0 if "lora_B" in name else 1.0) for name, tensor in tensors.items()}


class Waiting:
    """An engine listener that a test waits on, for tensors."""

    def __init__(self, request: GenerationRequest) -> None:
        self.inputs = Inputs(request)
        self._ended: SimpleQueue[Tensor | BaseException] = SimpleQueue()

    def accepted(self, position: int, expected_s: float) -> None:
        """Nobody waits for it."""

    def started(self) -> None:
        """Nobody waits for it."""

    def step_ended(self, step: int, steps: int) -> None:
        """Nobody waits for it."""

    def predicted(self, *args: Any) -> None:
        """Nobody waits for it."""

    def finished(self, result: Tensor, timings: Timings) -> None:
        self._ended.put(result)

    def failed(self, error: BaseException, timings: Timings) -> None:
        self._ended.put(error)

    def wait(self) -> Tensor:
        outcome = self._ended.get(timeout=PATIENCE_S)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@dataclass(frozen=True)
class AdaptedFamily:
    """A family with a folder of adapters.

    Args:
        family: which one.
        folder: of its model; the adapters are beside it.
        kinds: its adapters by name.
        dtype: of its modules.
    """

    family: Family
    folder: Path
    kinds: Mapping[str, Kind | Tensors]
    dtype: torch.dtype = torch.float64

    def save(self) -> None:
        """Write the model and its adapters."""
        save_sized(self.family, self.folder / "model")
        (self.folder / "adapters").mkdir()
        for seed, (name, kind) in enumerate(self.kinds.items()):
            save_adapter(self.family.build(), self.file(name), kind, seed)

    def file(self, name: str) -> Path:
        """Of an adapter."""
        return self.folder / "adapters" / f"{name}.safetensors"

    def runner(self, max_loaded: int = 16, max_rows: int = 32) -> PipelineRunner:
        """A runner that has not been started."""
        loaded_as = next((n for n, dtype in DTYPES.items() if dtype is self.dtype), "float32")
        model = load_model(MODEL, self.folder / "model", loaded_as, "cpu")
        model.pipeline.to(self.dtype)
        engine = EngineOptions(max_rows=max_rows, max_pending_images=100, threads=1)
        adapters = AdapterOptions(folder=self.folder / "adapters", max_loaded=max_loaded)
        return PipelineRunner(model, engine, adapters, AS_THEY_COME)

    def plain(self) -> Plain:
        """The same as diffusers has it."""
        return Plain(self)

    def request(self, variation: Variation, uses: Uses) -> GenerationRequest:
        """What the engine is told of a request."""
        return GenerationRequest(
            id=str(variation.index),
            model=MODEL,
            prompt=variation.prompt,
            width=64,
            height=64,
            num_inference_steps=variation.num_inference_steps,
            guidance_scale=variation.guidance_scale,
            seed=variation.seed,
            scheduler=self.scheduler_of(variation),
            adapters=uses,
        )

    def scheduler_of(self, variation: Variation) -> str:
        """The class that this request asks for."""
        names = self.family.schedulers
        return names[variation.index % len(names)] if names else ""

    def draw(
        self,
        pipeline: Any,
        variation: Variation,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """What a request gets, which has this copy of a pipeline to itself."""
        name = self.scheduler_of(variation)
        cls = getattr(diffusers, name) if name else type(pipeline.scheduler)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
        watch_steps(pipeline.scheduler, lambda step, latents: on_step(step))
        return self.family.result(pipeline(**self.family.arguments(pipeline, variation)))

    def submit(
        self,
        runner: PipelineRunner,
        variation: Variation,
        uses: Uses = (),
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Waiting:
        """A request by way of the adapter cache and the engine, for tensors."""
        model = runner.model
        scheduler = self.scheduler_of(variation) or model.capabilities.default_scheduler
        request = replace(self.request(variation, uses), scheduler=scheduler)
        waiting = Waiting(request)
        track = track_of(model, runner.adapters, runner.controls, request, cast(Any, waiting))
        variant = runner.adapters.resolve(uses)

        def run() -> Tensor:
            return self.draw(model.factory.copy(), variation, on_step)

        adapted = partial(runner.adapters.run_with, variant, run)
        runner.engine.submit(replace(track, run=adapted))
        return waiting


class Plain:
    """Plain diffusers, with the same adapters loaded the plain way."""

    def __init__(self, adapted: AdaptedFamily) -> None:
        self._adapted = adapted
        self._bare = self._load()
        self._pipeline = self._load()
        self._names = {name: f"plain{index}" for index, name in enumerate(adapted.kinds)}
        for name, known_as in self._names.items():
            file = adapted.file(name)
            self._pipeline.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=known_as
            )
        for component in self._pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval()

    def __call__(self, variation: Variation, uses: Uses) -> Tensor:
        pipeline = self._pipeline if uses else self._bare
        if uses:
            used = sorted(uses, key=lambda use: use.name)
            names, scales = [self._names[use.name] for use in used], [use.scale for use in used]
            pipeline.set_adapters(names, scales)
        return self._adapted.draw(copy.copy(pipeline), variation)

    def _load(self) -> Any:
        folder = self._adapted.folder / "model"
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self._adapted.dtype)


def serve_together(
    adapted: AdaptedFamily,
    runner: PipelineRunner,
    requests: Sequence[tuple[Variation, Uses]],
) -> list[Tensor]:
    """All are submitted while the engine is held, so that they go in step."""
    with held(runner):
        waiting = [adapted.submit(runner, *request) for request in requests]
    return [one.wait() for one in waiting]


@contextmanager
def held(runner: PipelineRunner) -> Iterator[None]:
    """Keep the engine's thread to the end of the block."""
    is_held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        go_on.wait()

    holding = threading.Thread(target=runner.engine.call, args=(hold,))
    holding.start()
    is_held.wait()
    try:
        yield
    finally:
        go_on.set()
        holding.join()


def use(name: str, scale: float = 1.0) -> Uses:
    return (AdapterUse(name, scale),)
