"""What forwards of a size need is found out when that size first comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stepserve.engine.batch_invariance import run_together
from stepserve.engine.calls.call import Call, ParkableMethod, make_call
from stepserve.pipelines.probing.shape_rules import SizeRules
from stepserve.pipelines.probing.sharing_plan import FIXED_ROWS
from torch import Tensor

LAST_BIT = 2**-10
MOST = 16


class Device:
    """Rounds by the row count: never for a width of 1, from 13 rows on for 2, and for 3 always but
    for multiples of 8.

    For a width of 4 it depends on the place in the batch as well, and for 5 it fails.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        rows, width = sample.shape
        self.rows.append(rows)
        if width == 5:
            raise ValueError("cannot be shared")
        off = {1: 0, 2: LAST_BIT * (rows > 12), 3: LAST_BIT * (rows % 8)}.get(width, 0)
        place = torch.arange(rows).reshape(-1, 1) * (LAST_BIT if width == 4 else 0.0)
        return (sample + off + place,)


@pytest.fixture
def device() -> Device:
    return Device()


def call_of(device: Device, width: int, rows: int = 2, **how: Any) -> Call:
    how = {"max_rows": MOST} | how
    method = ParkableMethod("unet", "forward", device.forward, **how)
    return make_call(method, (torch.rand(rows, width),), {})


def rules(most_rows: int = MOST, fix_rows: bool = True) -> SizeRules:
    return SizeRules(lambda: most_rows, fix_rows)


def test_a_size_that_needs_nothing_is_left_alone(device: Device) -> None:
    call, found = call_of(device, width=1), rules()
    assert found(call) is call
    assert found.same_bytes
    assert max(device.rows) == MOST


def test_a_size_may_need_fewer_rows(device: Device) -> None:
    method = rules()(call_of(device, width=2)).method
    assert (method.max_rows, method.bucket_rows) == (12, ())


def test_a_size_may_need_forwards_that_are_filled_up(device: Device) -> None:
    found = rules()
    calls = [found(call_of(device, width=3, rows=rows)) for rows in (1, 2, 3)]
    assert {call.method.bucket_rows for call in calls} == {(FIXED_ROWS, 2 * FIXED_ROWS)}
    assert {call.method.max_rows for call in calls} == {2 * FIXED_ROWS}
    assert found.same_bytes
    alone = [run_together([call])[0][0] for call in calls]
    together = [output[0] for output in run_together(calls)]
    assert all(map(torch.equal, alone, together))


def test_where_nothing_helps_it_is_told(device: Device) -> None:
    for width, found in ((4, rules()), (5, rules()), (3, rules(fix_rows=False))):
        call = call_of(device, width)
        assert found(call) is call
        assert not found.same_bytes


def test_a_size_is_tried_once(device: Device) -> None:
    found = rules()
    first = found(call_of(device, width=3))
    tried = len(device.rows)
    assert found(first) is first
    assert found(call_of(device, width=3, rows=5)).method is first.method
    assert len(device.rows) == tried


def test_no_more_rows_are_tried_than_forwards_may_have(device: Device) -> None:
    call = call_of(device, width=2)
    assert rules(most_rows=10)(call) is call
    assert max(device.rows) == 10


def test_what_is_never_shared_is_not_tried(device: Device) -> None:
    call = call_of(device, width=3, max_rows=1)
    assert rules()(call) is call
    assert device.rows == []


def test_forwards_that_are_filled_up_are_tried_as_they_are(device: Device) -> None:
    tried = ((3, (8, 16), True), (3, (8, 12), False), (4, (8,), False))
    for width, bucket_rows, kept in tried:
        found = rules()
        call = call_of(device, width, bucket_rows=bucket_rows)
        assert found(call) is call
        assert found.same_bytes is kept


def test_where_memory_ends_before_the_largest_forwards_the_smaller_ones_are_kept(
    device: Device,
) -> None:
    def scarce(sample: Tensor) -> tuple[Tensor]:
        if sample.shape[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return device.forward(sample)

    found = rules()
    call = call_of(device, width=1, bucket_rows=(4, 8, 16))
    method = found(replace(call, method=replace(call.method, run=scarce))).method
    assert (method.bucket_rows, method.max_rows) == ((4, 8), 8)
    assert found.same_bytes
