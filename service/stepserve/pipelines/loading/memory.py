"""How much memory a device has and holds."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes by kind: torch's on an accelerator, this process's where the device is the CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "used": total - free,
            "total": total,
        }
    if device.type == "mps":
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
        }
    return _resident_bytes()


def _resident_bytes() -> dict[str, int]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        # Not on Linux.
        return {}
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE")}
