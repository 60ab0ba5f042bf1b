"""The benchmark of mixed adapters on a tiny model: what it compares is what it says."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

from loadtests.adapters_bench import Load, Turns, measure


# numpy's word to torch, by way of diffusers' schedulers.
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_mixed_requests_take_as_few_forwards_as_with_one_adapter(
    tmp_path: Path, one_thread: None
) -> None:
    load = Load(requests=4, adapters=2, steps=8, rank=2, listed=6, repeats=3)
    options = Namespace(model=save_tiny_model(tmp_path), threads=1, dtype="float32")
    turns, batch = measure(options, load)
    # The first request of a turn may be a step ahead of the others.
    fewest = {way: min(each.forwards) for way, each in turns.items()}
    assert 8 <= fewest["mixed"] <= 10
    assert 8 <= fewest["one for all"] <= 10
    assert fewest["forwards of their own"] >= 16
    assert all(len(each.seconds) == 3 and each.images_per_s > 0 for each in turns.values())
    assert batch.step_s > 0 < batch.step_without_s
    # Each row has factors of its own.
    assert 0 < batch.file_bytes < batch.stacked_bytes
    assert batch.file_bytes < batch.before_bytes


def test_the_spread_of_turns_is_that_of_the_middle_half() -> None:
    turns = Turns((1.0, 2.0, 2.0, 2.0, 30.0), (), requests=4)
    assert turns.images_per_s == 2.0
    assert Turns((2.0, 2.0, 2.0), (), 1).spread == 0
    assert Turns((1.0, 2.0, 3.0), (), 1).spread == pytest.approx(0.5)
