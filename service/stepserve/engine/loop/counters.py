"""Totals of one engine since it was started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Totals since the start. `busy_s - forward_s` is the time the engine itself took.

    `forwards`, `rows` and `calls` count what succeeded, and `padded_rows` what was run besides,
    for nobody, to fill forwards up; `retries` counts shared forwards that
    failed and were run again with fewer rows, and `out_of_memory` all for which memory ran out.
    `denoiser_rows` and `denoiser_s` are the part of rows and seconds that denoisers had.
    `unstacked` counts shapes whose row limit was lowered for good because sharing kept failing.
    """

    forwards: int = 0
    rows: int = 0
    padded_rows: int = 0
    calls: int = 0
    retries: int = 0
    out_of_memory: int = 0
    unstacked: int = 0
    denoiser_rows: int = 0
    denoiser_s: float = 0.0
    forward_s: float = 0.0
    busy_s: float = 0.0
