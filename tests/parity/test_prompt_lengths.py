"""Requests whose prompts have other lengths share forwards."""

from __future__ import annotations

from random import Random

import pytest
from families.catalogue import FAMILIES
from families.family import resident
from random_requests import random_requests, serve_at_once

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_to_qwen_image_take_half_as_many_forwards(seed: int) -> None:
    """Prompts, steps, guidance, images and seeds are random, and so is when each arrives."""
    family = FAMILIES["Qwen-Image"]
    random = Random(seed)
    arrivals = [random.randint(0, 4) for _ in range(12)]
    served = serve_at_once(resident(family), family, random_requests(12, seed), arrivals)
    assert served.calls >= 2 * served.forwards
    assert max(served.levels) <= 1
    # Else a mixed-up row would go unseen.
    assert served.separation > 10
