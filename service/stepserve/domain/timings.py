"""How long one request spent where. Headers, metrics and reports all read this one object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Seconds by stage.

    `first_step_s` is how long after its acceptance the first denoising step of the request began.
    `batch_share` is the mean share of a denoiser forward's rows that were the request's own.
    `denoiser_calls` were asked for up to then, of which `denoiser_calls_run` ran; the others were
    skipped.
    """

    queue_s: float = 0.0
    first_step_s: float = 0.0
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    batch_share: float = 1.0
    denoiser_calls: int = 0
    denoiser_calls_run: int = 0

    @property
    def denoiser_calls_skipped(self) -> int:
        """Calls whose output was predicted."""
        return self.denoiser_calls - self.denoiser_calls_run

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header (durations in milliseconds)."""
        stages = (
            ("queue", self.queue_s),
            ("first-step", self.first_step_s),
            ("encode", self.encode_s),
            ("denoise", self.denoise_s),
            ("decode", self.decode_s),
            ("total", self.total_s),
        )
        parts = [f"{name};dur={seconds * 1000:.1f}" for name, seconds in stages]
        ran = f"{self.denoiser_calls_run} of {self.denoiser_calls}"
        return ", ".join(
            [*parts, f'batch;desc="share {self.batch_share:.3f}"', f'forwards;desc="{ran}"']
        )
