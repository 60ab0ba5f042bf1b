"""Memory that the C library keeps although nobody uses it any more.

Forwards of ever other numbers of rows leave holes in the heap that fit nobody: after some hundred
of them a replica of the embedded model held 1.3 GB, of which 0.4 were holes. Giving them back takes
25 ms, and the forwards that follow are not measurably slower.

An ingress holds bodies of megabytes for seconds. Once one was freed, glibc puts the next ones on
the heap as well, where what stays in between keeps them from being given back: 50 bodies of 20 MB
left 2 GB. So large blocks are kept apart there, and are given back when they are freed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

TRIM_INTERVAL_S = 60.0
INGRESS_TRIM_INTERVAL_S = 20.0

LARGE_BYTES = 2**18
MMAP_THRESHOLD = -3
ARENA_MAX = -8
MOST_ARENAS = 2
"""Each thread has a heap of its own else, with holes of its own."""


def heap_trimmer() -> Callable[[], None] | None:
    """What gives unused pages of the heap back to the system; None where nothing can (no glibc)."""
    malloc_trim = _libc_function("malloc_trim")
    if malloc_trim is None:
        return None

    def trim() -> None:
        malloc_trim(ctypes.c_size_t(0))

    return trim


def keep_large_blocks_apart() -> None:
    """Let blocks from `LARGE_BYTES` on be given back when they are freed, from now on.

    Not where tensors come and go: each would cost new pages.
    """
    if (mallopt := _libc_function("mallopt")) is not None:
        mallopt(MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(ARENA_MAX, MOST_ARENAS)


def _libc_function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
