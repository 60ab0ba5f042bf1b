"""A diffusers folder with a tiny random text-to-image model: quick to make, load and run."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from stepserve.domain.events import Event, Failed, Finished
from stepserve.domain.requests import GenerationRequest
from stepserve.domain.tasks import Task
from stepserve.pipelines.copies.factory import PipelineFactory
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 16
# For tests that count forwards, and in float32: requests share as they come.
UNTRIED = SharingOptions(plan=SharingPlan())
NATIVE_PX = 64
# The settings of Stable Diffusion 1.5.
STABLE_DIFFUSION = PNDMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    skip_prk_steps=True,
    set_alpha_to_one=False,
    steps_offset=1,
)


def save_tiny_model(folder: Path, scheduler: Any = None, **manifest: object) -> Path:
    """Write the model and its `stepserve.json`; without manifest entries, none is written."""
    torch.manual_seed(0)
    tokenizer = tiny_clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=scheduler or default_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    if manifest:
        (folder / "stepserve.json").write_text(json.dumps(manifest))
    return folder


def default_scheduler() -> DDIMScheduler:
    """The settings of the embedded model."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def tiny_clip_tokenizer(max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A real CLIP tokenizer that knows letters only."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_tokens)


def _text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=NATIVE_PX,
    )


def a_request(**changes: Any) -> GenerationRequest:
    request = GenerationRequest(
        id="r",
        model="tiny",
        prompt="red heart",
        width=NATIVE_PX,
        height=NATIVE_PX,
        num_inference_steps=2,
        guidance_scale=4.0,
        seed=3,
        scheduler="DDIMScheduler",
    )
    return replace(request, **changes)


def changed_call(model: LoadedModel, mixin: type) -> LoadedModel:
    """The model with a call that is wrapped by a class of its own."""
    factory = PipelineFactory(model.pipeline, model.schedulers)
    pipeline, cls = factory._pipelines[Task.TEXT_TO_IMAGE]
    factory._pipelines[Task.TEXT_TO_IMAGE] = pipeline, type(cls.__name__, (mixin, cls), {})
    return replace(model, factory=factory)


class Inbox:
    """A sink that a test can wait on."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._outcomes: SimpleQueue[Finished | Failed] = SimpleQueue()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self._outcomes.put(event)

    def wait(self) -> Finished | Failed:
        return self._outcomes.get(timeout=60)

    @property
    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


def submit_all(runner: PipelineRunner, requests: Sequence[GenerationRequest]) -> list[Inbox]:
    """An inbox for each."""
    inboxes = [Inbox() for _ in requests]
    for request, inbox in zip(requests, inboxes, strict=True):
        runner.submit(request, inbox)
    return inboxes


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()
