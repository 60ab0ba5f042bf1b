"""Holes in the heap go back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest
from stepserve.ray_serve.heap import heap_trimmer

# In a process of its own: what others have on the heap would be in the way.
FRAGMENTED = """
import ctypes, psutil
from stepserve.ray_serve.heap import heap_trimmer

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
resident = lambda: psutil.Process().memory_full_info().uss
# Small enough for the heap, large enough for whole pages to be free between those that stay.
blocks = [libc.malloc(60_000) for _ in range(2_000)]
for block in blocks:
    ctypes.memset(block, 1, 60_000)
for place, block in enumerate(blocks):
    if place % 10:
        libc.free(block)
before = resident()
heap_trimmer()()
print(before - resident())
"""


def test_pages_between_what_stays_are_given_back() -> None:
    if heap_trimmer() is None:
        pytest.skip("another C library than glibc")
    run = [sys.executable, "-c", FRAGMENTED]
    freed_bytes = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert freed_bytes > 80_000_000


# Blocks of an ingress: each is held until the next ones are there, with small ones in between.
BODIES = """
import psutil
from stepserve.ray_serve.heap import keep_large_blocks_apart

keep_large_blocks_apart()
resident = lambda: psutil.Process().memory_full_info().uss
before, kept = resident(), []
for _ in range(3):
    bodies = []
    for _ in range(10):
        bodies.append(bytearray(b"x") * 20_000_000)
        kept.append([bytes(5_000) for _ in range(10)])
    held = resident()
    del bodies
print(held - before, resident() - before)
"""


def test_large_blocks_are_given_back_when_they_are_freed() -> None:
    if heap_trimmer() is None:
        pytest.skip("another C library than glibc")
    run = [sys.executable, "-c", BODIES]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    held_bytes, left_bytes = map(int, told.split())
    assert held_bytes > 190_000_000
    assert left_bytes < 20_000_000
