"""What a device's errors mean: that memory ran out, or that the device is lost for good."""

from __future__ import annotations

import torch

OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch tells it by several types, and on CPU by the text alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(t in text for t in OUT_OF_MEMORY_TEXTS)


def is_device_lost(error: BaseException) -> bool:
    """Whether this error stays: after an illegal access, say, every later operation raises it too.

    Others of a GPU's errors, such as a launch with arguments that it does not take, concern one
    operation only.
    """
    if not isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return False
    try:
        torch.accelerator.synchronize()
    except Exception:
        return True
    return False
