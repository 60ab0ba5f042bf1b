"""Models that are prepared with less trying, where images are compared and not bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stepserve.engine import batch_invariance


@contextmanager
def few_vectors() -> Iterator[None]:
    """Layers of tiny models have few outputs: to see enough of their bits takes most of a start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_invariance, "VECTOR_NUMBERS", 2**10)
        yield
