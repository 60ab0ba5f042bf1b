"""What the code of a pipeline class does that its signature does not say."""

from __future__ import annotations

import inspect
import logging

import torch

from stepserve.pipelines.facts.signature import CallSignature

logger = logging.getLogger(__name__)

FLOAT32_ONLY = frozenset(
    {
        "ConsistencyModelPipeline",
        "DDIMPipeline",
        "DDPMPipeline",
        "LDMPipeline",
        "LDMSuperResolutionPipeline",
        "PNDMPipeline",
    }
)
"""They hand what their denoiser made to NumPy, which knows no bfloat16, or draw float32 noise."""


def possible_dtype(pipeline_class: type, wanted: torch.dtype) -> torch.dtype:
    """What pipelines of a class can be loaded in, instead of `wanted` where they must."""
    name = pipeline_class.__name__
    if name not in FLOAT32_ONLY or wanted is torch.float32:
        return wanted
    logger.info("%s works in float32 only, so it is loaded so", name)
    return torch.float32


def scales_noise(pipeline_class: type, signature: CallSignature) -> bool:
    """Whether a pipeline multiplies its first noise by what its scheduler wants.

    Those with a prompt do, where their schedulers want it. Of others it can only be read.
    """
    return signature.accepts("prompt") or "init_noise_sigma" in inspect.getsource(pipeline_class)
