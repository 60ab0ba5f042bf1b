"""Has the device been lost? Then nothing that runs in this process can use it again."""

from __future__ import annotations

import torch

from stepserve.engine.scheduling.row_limits import is_out_of_memory


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
