"""What decides the bytes of an image besides its request."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

SHORT_CHARACTERS = 16


@dataclass(frozen=True)
class Fingerprint:
    """Where a model runs and what it is made of.

    The same request gives the same bytes wherever fingerprints are equal. Where they differ it may
    give other bytes: another processor, version of torch or number of threads may round otherwise.

    Args:
        weights: SHA-256 over the files with weights and with the settings of components.
        stepserve: version, as are `torch`, `diffusers` and `transformers`.
        device: type of the device, such as `cpu`.
        processor: what kernels are chosen by: the CPU's capability, or the GPU's name.
        dtype: what the model computes in, such as `bfloat16`.
        row_buckets: to how many rows forwards are padded.
        threads: that CPU kernels use; 0 where that is not known.
        code: what runs the denoiser, `eager` or `compiled`: the two round differently.
    """

    weights: str
    stepserve: str
    torch: str
    diffusers: str
    transformers: str
    device: str
    processor: str
    dtype: str
    row_buckets: str = "any rows"
    threads: int = 0
    code: str = "eager"

    @property
    def digest(self) -> str:
        """SHA-256 over everything above, in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def short(self) -> str:
        """The beginning of the digest: enough to distinguish fingerprints."""
        return self.digest[:SHORT_CHARACTERS]
