"""How a model takes guidance, and what guidance costs: measured once, when the model is loaded.

The engine, admission and the router all count rows and denoiser calls of a request with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from stepserve.domain.requests import GenerationRequest


class GuidanceKind(StrEnum):
    """What a guidance scale does to a model."""

    CLASSIFIER_FREE = "classifier-free"
    """Each step predicts the noise with the prompt and without it."""

    EMBEDDED = "embedded"
    """The scale is an input of the denoiser: guidance costs nothing."""

    NONE = "none"
    """The model takes no guidance scale."""


@dataclass(frozen=True)
class StepWork:
    """One step of a request for one image.

    Args:
        rows: of each call of the denoiser.
        calls: of the denoiser.
    """

    rows: int = 1
    calls: int = 1

    @property
    def total_rows(self) -> int:
        """Rows of all calls of the step."""
        return self.rows * self.calls


PLAIN = StepWork()


@dataclass(frozen=True)
class Guidance:
    """How a model takes guidance.

    Args:
        argument: of the pipeline's call that `guidance_scale` is passed as; empty: it takes none.
        above: a request is guided if its scale is over this.
        negative_prompt: whether a negative prompt changes the image.
        needs_negative: whether a call is only guided if it is given some negative prompt.
        guided: what a step of a guided request takes.
        unguided: what a step of any other request takes.
    """

    argument: str = "guidance_scale"
    above: float = 1.0
    negative_prompt: bool = True
    needs_negative: bool = False
    guided: StepWork = StepWork(rows=2)
    unguided: StepWork = PLAIN

    @property
    def kind(self) -> GuidanceKind:
        """What a guidance scale does."""
        if not self.argument:
            return GuidanceKind.NONE
        if self.guided == self.unguided and not self.negative_prompt:
            return GuidanceKind.EMBEDDED
        return GuidanceKind.CLASSIFIER_FREE

    def guides(self, scale: float) -> bool:
        """Whether a request with this scale is guided."""
        return bool(self.argument) and scale > self.above

    def step_of(self, request: GenerationRequest) -> StepWork:
        """What a step of a request takes for each of its images."""
        return self.guided if self.guides(request.guidance_scale) else self.unguided

    def rows_of(self, request: GenerationRequest) -> int:
        """Rows of each denoiser call of a request, unless guidance is limited to some steps."""
        return request.n * self.step_of(request).rows

    def calls_of(self, request: GenerationRequest, timesteps: int) -> int:
        """Denoiser calls of a request that goes through so many timesteps."""
        return timesteps * self.step_of(request).calls


CLASSIC = Guidance()
"""As most pipelines have it: the rows with and without the prompt in one call."""
