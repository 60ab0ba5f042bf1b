"""The little of the HTTP API that load generators need to know."""

from __future__ import annotations

import re

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
REFUSED = (429, 503)
"""Statuses of a server that takes no more work now: no failures."""

EXPIRED = 504

_TIMING = re.compile(r'([\w-]+);(?:dur=([\d.]+)|desc="share ([\d.]+)")')


def read_server_timing(header: str) -> dict[str, float]:
    """Seconds by stage, and under `batch` the share of its forwards that a request had."""
    found = _TIMING.findall(header)
    return {
        name: float(milliseconds) / 1000 if milliseconds else float(share)
        for name, milliseconds, share in found
    }
