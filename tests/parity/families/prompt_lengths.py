"""Do requests share forwards whose prompts have other lengths? Measured for a family.

Three requests that differ in the words of their prompts, and in the seed, run at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.modules.parking import parkable_methods
from stepserve.pipelines.probing.sharing_check import (
    ENOUGH_ROWS,
    ProbeRequest,
    SharingReport,
    check_sharing,
    run_plainly,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from families.examine import make_plan
from families.family import Family, Variation, resident
from families.tokenizers import WORDS

WORD_COUNTS = (3, 20, 60)
MOST_SHARED = len(WORD_COUNTS)
ROOM = 77
"""Tokens that prompts may have: as many as CLIP reads."""

CANNOT_BE_FILLED = {
    "CogView4Transformer2DModel": "its attention adds the mask to its scores as zeros and ones, "
    "which keeps nothing out",
    "JoyImageEditTransformer3DModel": "its forward takes no mask of the text",
    "Kandinsky3UNet": "its forward takes the mean of all text tokens, masked or not",
    "Kandinsky5Transformer3DModel": "its forward takes no mask of the text",
    "QwenImage21Transformer2DModel": "one row says for all where text ends and the image begins",
}
"""Why requests share only where prompts have equally many tokens, by class of the denoiser."""

ALONE_ANYHOW = {
    "ControlNetUnionModel": "calls of its ControlNet run alone, whatever the prompts",
}
"""Why calls of a module share nothing, by its class."""


@dataclass(frozen=True)
class WordyVariation(Variation):
    """A request whose prompt has so many words; a word is a token where tokens are counted."""

    words: int = 1

    @property
    def prompt(self) -> str:
        """Begins with another word for another count."""
        known = WORDS.split()[:20]
        return " ".join(known[(self.words + index) % len(known)] for index in range(self.words))


def reason(family: Family) -> str:
    """Why requests with prompts of other lengths share fewer forwards; empty if they share all."""
    if not family.shares:
        return "its requests run one at a time"
    reasons = CANNOT_BE_FILLED | ALONE_ANYHOW
    modules = (type(module).__name__ for _, module, _ in parkable_methods(resident(family)))
    return next((reasons[name] for name in modules if name in reasons), "")


def measure(family: Family, pads_prompts: bool = True) -> SharingReport:
    """Run the requests at once, in float64 if the family can, and compare with plain calls.

    Args:
        family: of the requests.
        pads_prompts: whether texts are filled up, where a rule says how.
    """
    pipeline = build_roomy(family, torch.float64 if family.float64 else None)
    probes = make_wordy_requests(family, pipeline)
    plain = run_plainly(pipeline, probes)
    plan = make_plan(family, pipeline, probes, plain)
    options = replace(plan.parking(ENOUGH_ROWS), pads_prompts=pads_prompts)
    return check_sharing(pipeline, probes, plain, options=options, one_at_a_time=plan.serial)


def build_roomy(family: Family, dtype: torch.dtype | None) -> Any:
    """A pipeline of its own that reads prompts of `ROOM` tokens; None leaves it as it is built."""
    pipeline = family.build()
    if dtype is not None:
        pipeline = pipeline.to(dtype)
    _make_room(pipeline)
    return pipeline


def make_wordy_requests(family: Family, pipeline: Any) -> list[ProbeRequest]:
    """One for each of `WORD_COUNTS`."""
    scale = family.guidance_scales[0]
    variations = [WordyVariation(0, 100 + words, 3, scale, words=words) for words in WORD_COUNTS]
    return [partial(_call, family, pipeline, variation) for variation in variations]


def _call(family: Family, pipeline: Any, variation: WordyVariation) -> Tensor:
    copied = copy_pipeline(pipeline)
    arguments = family.arguments(copied, variation)
    if "max_sequence_length" in arguments and _reads_any_length(pipeline):
        arguments["max_sequence_length"] = ROOM
    return family.result(copied(**arguments))


def _make_room(pipeline: Any) -> None:
    """Else the tokenizers of the suite would cut prompts to one length."""
    for component in vars(pipeline).values():
        if isinstance(component, DiffusionPipeline):
            _make_room(component)
        elif isinstance(component, PreTrainedTokenizerFast):
            component.model_max_length = max(component.model_max_length, ROOM)


def _reads_any_length(pipeline: Any) -> bool:
    """Whether the denoiser has no table with a place for each token of a text of one length."""
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    return "max_text_seq_length" not in config
