"""Imports are not held up by a collector that finds nothing."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from stepserve.garbage import collection_paused

IMPORTED = """
import gc, sys
from stepserve.garbage import collection_paused
collections = []
gc.callbacks.append(lambda phase, info: collections.append(phase))
with collection_paused():
    import diffusers
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 10_000)
"""


def test_nothing_is_collected_while_libraries_are_imported() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert ran.stdout.split() == ["0", "True", "True"], ran.stderr


def test_it_collects_again_although_an_import_failed() -> None:
    def fail() -> None:
        with collection_paused():
            assert not gc.isenabled()
            raise ImportError("no such library")

    try:
        with pytest.raises(ImportError):
            fail()
        assert gc.isenabled()
    finally:
        gc.unfreeze()
