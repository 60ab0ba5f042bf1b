"""What one caller asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OutputFormat(StrEnum):
    """File formats of finished pictures."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


@dataclass(frozen=True)
class GenerationRequest:
    """A text-to-image request with every default filled in.

    Picture `i` of `n` is drawn from seed `seed + i`, so that each can be made again alone.
    `guidance_scale` of 1 or less means no classifier-free guidance and one row instead of two.
    """

    id: str
    model: str
    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str
    negative_prompt: str = ""
    n: int = 1
    output_format: OutputFormat = OutputFormat.PNG

    @property
    def rows(self) -> int:
        """Rows that each denoiser call of this request takes."""
        return self.n * (2 if self.guidance_scale > 1 else 1)
