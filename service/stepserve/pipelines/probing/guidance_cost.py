"""How a pipeline takes guidance, and what that costs: seen in small requests, before it serves.

Most pipelines stack the rows with and without the prompt in one call of the denoiser. FLUX takes
the scale as an input and has one row an image; CogView 4 and Lumina 2 call the denoiser twice;
Qwen-Image takes the scale as `true_cfg_scale`, and guides only who gives a negative prompt. Some
have a guider, an object that holds the scale. Many take arguments that they make nothing of.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from stepserve.domain.guidance import CLASSIC, PLAIN, Guidance, StepWork
from stepserve.engine.calls.call import ParkableMethod, make_call
from stepserve.engine.tracks.interception import parameter_names
from stepserve.pipelines.facts.capabilities import (
    denoiser_of,
    guidance_arguments,
    usual_guidance_scale,
)
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.parking import rules_of
from stepserve.pipelines.probing.probe_requests import probe_request, run_probe
from stepserve.pipelines.probing.sharing_check import difference
from stepserve.pipelines.requests.call import NO_NEGATIVE_PROMPT, denoiser_calls

logger = logging.getLogger(__name__)

OFF, FULL, NO_SCALE = 1.0, 6.0, 0.0
NEGATIVE_PROMPT = "a blue house"
# As a share of the largest value. Less is round-off: a device need not do twice the same.
LEAST_EFFECT = 1e-4


@dataclass(frozen=True)
class Seen:
    """What came of a small request: its image, and what each of its steps took."""

    image: Tensor
    step: StepWork

    def differs(self, other: Seen) -> bool:
        """Whether what the two requests differ in had an effect."""
        return difference(self.image, other.image) > LEAST_EFFECT


class GuidanceTrial:
    """Tries a model's guidance with small requests of its usual task.

    Each is run once, however often it is asked for.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._seen: dict[tuple[Guidance, float, str], Seen] = {}

    def find(self) -> Guidance:
        """How the model takes guidance.

        Raises:
            Exception: whatever the pipeline raises, if a small request without guidance fails.
        """
        signature = self._model.factory.signature(self._model.capabilities.usual_task)
        takes_negative = signature.accepts("negative_prompt")
        arguments = guidance_arguments(self._model.pipeline, signature)
        # Those that need a negative prompt to guide do nothing with the scale alone.
        needs = (False, True) if takes_negative else (False,)
        for argument, needs_negative in product(arguments, needs):
            tried = Guidance(argument, OFF, takes_negative, needs_negative)
            # Both with a negative prompt or both without: it may turn on guidance by itself.
            without = self._see(tried, OFF, NO_NEGATIVE_PROMPT if needs_negative else "")
            if self._see(tried, FULL).differs(without):
                return self._measured(tried)
        return self._without_argument(takes_negative)

    def _measured(self, guidance: Guidance) -> Guidance:
        guided, unguided = self._see(guidance, FULL).step, self._see(guidance, OFF).step
        if guided == unguided and guided.total_rows > 1:
            # Some guide by every scale that is not zero.
            without = self._see(guidance, NO_SCALE).step
            if without.total_rows < guided.total_rows:
                guidance, unguided = replace(guidance, above=NO_SCALE), without
        return replace(
            guidance,
            negative_prompt=guidance.negative_prompt and self._heeds_negative(guidance, FULL),
            guided=guided,
            unguided=unguided,
        )

    def _without_argument(self, takes_negative: bool) -> Guidance:
        none = Guidance("", OFF, takes_negative)
        step = self._see(none, OFF).step
        heeds = takes_negative and self._heeds_negative(none, OFF)
        return replace(none, negative_prompt=heeds, guided=step, unguided=step)

    def _heeds_negative(self, guidance: Guidance, scale: float) -> bool:
        with_one = self._see(guidance, scale, NEGATIVE_PROMPT)
        return with_one.differs(self._see(guidance, scale))

    def _see(self, guidance: Guidance, scale: float, negative_prompt: str = "") -> Seen:
        wanted = guidance, scale, negative_prompt
        if wanted not in self._seen:
            self._seen[wanted] = _run(self._model, *wanted)
        return self._seen[wanted]


def find_guidance(model: LoadedModel) -> Guidance:
    """Try how a model takes guidance; what its signature promises where that cannot be seen.

    Run it where the model may run, before it is attached.
    """
    try:
        return GuidanceTrial(model).find()
    except Exception as error:
        logger.info("how guidance works could not be seen: %s: %s", type(error).__name__, error)
        return model.capabilities.guidance


def with_probed_guidance(model: LoadedModel) -> LoadedModel:
    """The model with the guidance that it was seen to take. Run it as `find_guidance`."""
    guidance, before = find_guidance(model), model.capabilities.guidance
    capabilities = replace(model.capabilities, guidance=guidance)
    if not guidance.argument:
        capabilities = replace(capabilities, default_guidance_scale=OFF, max_guidance_scale=OFF)
    elif guidance.argument != before.argument:
        signature = model.factory.signature(capabilities.usual_task)
        usual = usual_guidance_scale(model.pipeline, signature, guidance.argument)
        scale = capabilities.default_guidance_scale if usual is None else usual
        capabilities = replace(capabilities, default_guidance_scale=scale)
    return replace(model, capabilities=capabilities)


def _run(model: LoadedModel, guidance: Guidance, scale: float, negative_prompt: str) -> Seen:
    """Run one small request as if the model took guidance so."""
    tried = replace(model, capabilities=replace(model.capabilities, guidance=guidance))
    request = replace(
        probe_request(tried, tried.capabilities.usual_task, 0, tried.capabilities.sizes.minimum),
        guidance_scale=scale,
        negative_prompt=negative_prompt,
    )
    rows: list[int] = []
    denoiser = denoiser_of(model.pipeline)
    with torch.no_grad(), nullcontext() if denoiser is None else _noting_rows(denoiser, rows):
        image = run_probe(tried, request)
    if not rows:
        # A pipeline of several parts, whose steps are not seen.
        return Seen(image, CLASSIC.guided if guidance.guides(scale) else PLAIN)
    calls = max(round(len(rows) / denoiser_calls(tried, request)), 1)
    return Seen(image, StepWork(max(rows), calls))


def _noting_rows(denoiser: Any, rows: list[int]) -> AbstractContextManager[Any]:
    """Note the rows of every call of the denoiser until the end of the block."""
    rules = rules_of(denoiser)
    parameters = parameter_names(denoiser.forward)
    method = ParkableMethod("", "", denoiser.forward, parameters=parameters, rules=rules)

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(make_call(method, args, kwargs).rows)

    handle: AbstractContextManager[Any] = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    return handle
