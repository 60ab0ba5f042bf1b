"""What the parity suite needs to know about one family of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Equally many words, so that tokenizers that do not pad give equally many tokens.
PROMPTS = ("a red heart", "a big apple", "a wet stone", "a new house", "a blue bird", "a cold lake")
NEGATIVE_PROMPT = "a bad image"


@dataclass(frozen=True)
class Variation:
    """How one of several concurrent requests differs from the others."""

    index: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    strength: float = 1.0

    @property
    def prompt(self) -> str:
        """What it asks for."""
        return PROMPTS[self.index % len(PROMPTS)]

    def generator(self) -> torch.Generator:
        """Its noise: always a generator of its own, on the CPU."""
        return torch.Generator("cpu").manual_seed(self.seed)

    def tensor(self, *shape: int) -> Tensor:
        """Something of its own to start from, between 0 and 1: an image, a mask, an embedding."""
        return torch.rand(shape, generator=torch.Generator("cpu").manual_seed(9000 + self.seed))


def first_output(output: Any) -> Tensor:
    """The first value of a pipeline's output as a float tensor: images, frames, embeddings."""
    value = output[0]
    if isinstance(value, list) and isinstance(value[0], np.ndarray | Tensor):
        value = torch.stack([torch.as_tensor(item) for item in value])
    return torch.as_tensor(value).detach()


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Args:
        name: as a person would say it, such as `Stable Diffusion, image to image`.
        build: a tiny pipeline with random weights: the same ones at every call, in float32, all
            modules in eval mode. It takes a second or two at most.
        arguments: keyword arguments of one request: `pipeline(**arguments(pipeline, variation))`.
            They ask for tensors or arrays (`output_type="pt"`), at the smallest size, and pass
            `variation.generator()`.
        denoiser: the component that is called at every step, and that requests should share.
        schedulers: classes, by name, that requests of one batch mix; empty where the family has
            one only.
        result: what is compared, out of what the call returned.
        guidance_scales: which the requests use in turn.
        shares: whether requests are expected to share forwards of the denoiser.
        least_sharing: fewest calls that one forward must serve on average, of four requests with
            2, 3, 4 and 5 steps at once. The most possible is 2.8.
        float64: whether it can run in double precision.
        bfloat16: whether it can run in bfloat16.
        requests: how many run at once.
        remark: what it needs, or why it cannot share; for the table in the docs.
    """

    name: str
    build: Callable[[], Any]
    arguments: Callable[[Any, Variation], dict[str, Any]]
    denoiser: str = "transformer"
    schedulers: tuple[str, ...] = ()
    result: Callable[[Any], Tensor] = first_output
    guidance_scales: tuple[float, ...] = (5.0, 3.0, 7.5, 5.0)
    shares: bool = True
    least_sharing: float = 2.4
    float64: bool = True
    bfloat16: bool = True
    requests: int = 4
    remark: str = ""

    def variations(self, count: int | None = None) -> list[Variation]:
        """Requests that differ in seed, steps, prompt, guidance and strength."""
        return [
            Variation(
                index=index,
                seed=100 + index,
                num_inference_steps=2 + index % 4,
                guidance_scale=self.guidance_scales[index % len(self.guidance_scales)],
                strength=(1.0, 0.8, 0.9, 0.7)[index % 4],
            )
            for index in range(self.requests if count is None else count)
        ]


@cache
def resident(family: Family) -> Any:
    """One pipeline of a family for all tests that leave it as it is; others build theirs."""
    return family.build()


def seeded(build: Callable[[], Any]) -> Callable[[], Any]:
    """Make `build` give the same weights every time, and leave torch's own state as it was."""

    def built() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = build()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return built
