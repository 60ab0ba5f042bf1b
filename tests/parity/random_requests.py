"""Random requests to one family, served at once, and each compared with its plain call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from families.family import Family, Variation
from families.tokenizers import WORDS
from stepserve.engine.loop.batcher import Batcher
from stepserve.pipelines.copies.factory import copy_pipeline
from stepserve.pipelines.probing.sharing_check import (
    ENOUGH_ROWS,
    Watch,
    run_at_once,
    run_plainly,
)
from torch import Tensor

LEVELS = 255


@dataclass(frozen=True)
class RandomRequest(Variation):
    """A request with a prompt of its own, for so many images.

    Args:
        text: the prompt.
        negative: the negative prompt.
        images: how many.
    """

    text: str = ""
    negative: str = ""
    images: int = 1

    @property
    def prompt(self) -> str:
        """What it asks for."""
        return self.text

    def arguments(self, family: Family, pipeline: Any) -> dict[str, Any]:
        """Keyword arguments of its call."""
        seeds = range(self.seed, self.seed + self.images)
        arguments = {
            **family.arguments(pipeline, self),
            "negative_prompt": self.negative,
            "num_images_per_prompt": self.images,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        }
        if "max_sequence_length" in arguments:
            # Else long prompts would be cut to the length of the others.
            arguments["max_sequence_length"] = 512
        return arguments


@dataclass(frozen=True)
class Served:
    """What came of requests at once.

    Args:
        calls: of the denoiser.
        forwards: that they took.
        levels: largest difference of each request's images to its plain call, of 255.
        separation: smallest difference between two requests for equally many images, of 255.
    """

    calls: int
    forwards: int
    levels: list[float]
    separation: float


def random_requests(count: int, seed: int, most_words: int = 60) -> list[RandomRequest]:
    """Requests that differ in prompts, steps, guidance, images and seeds."""
    random = Random(seed)

    def words(least: int) -> str:
        return " ".join(random.choices(WORDS.split(), k=random.randint(least, most_words)))

    return [
        RandomRequest(
            index=index,
            seed=1000 + 10 * index,
            num_inference_steps=random.randint(3, 8),
            guidance_scale=random.choice((1.0, 3.0, 5.0)),
            text=words(1),
            negative=words(0),
            images=random.randint(1, 3),
        )
        for index in range(count)
    ]


def serve_at_once(
    pipeline: Any, family: Family, requests: Sequence[RandomRequest], arrivals: Sequence[int]
) -> Served:
    """Serve them, each from a tick on, and compare with plain calls one after another.

    Raises:
        AssertionError: a request failed, or a shared forward raised.
    """
    probes = [partial(_images, pipeline, family, request) for request in requests]
    plain = run_plainly(pipeline, probes)
    batcher, watch = Batcher(ENOUGH_ROWS.max_rows), Watch(pipeline)
    with torch.no_grad(), watch.watching():
        listeners = run_at_once(batcher, pipeline, probes, arrivals, ENOUGH_ROWS)
    assert [listener.error for listener in listeners] == [None] * len(requests)
    assert batcher.counters.retries == 0
    pairs = zip(plain.results, listeners, strict=True)
    levels = [_levels_apart(wanted, listener.result) for wanted, listener in pairs]
    apart = [
        _levels_apart(one, other)
        for index, one in enumerate(plain.results)
        for other in plain.results[:index]
        if one.shape == other.shape
    ]
    return Served(plain.calls, watch.forwards, levels, min(apart))


def _images(pipeline: Any, family: Family, request: RandomRequest) -> Tensor:
    copied = copy_pipeline(pipeline)
    return family.result(copied(**request.arguments(family, copied)))


def _levels_apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max()) * LEVELS
