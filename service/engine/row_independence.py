"""Does a row get the same bits whatever it shares a forward with? Tried on the device at hand.

Kernels may sum in another order for another row count, so that the last bits of a row depend on how
many others there are. Some devices, dtypes and models are free of that at any row count; others
are within forwards of one fixed row count, filled up where requests have fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from service.engine.call import Call
from service.engine.coalesce import split, stack, tensors_in


def run_together(calls: Sequence[Call], padded_rows: int = 0) -> list[Any]:
    """Outputs of calls with equal keys, from one shared forward.

    It is filled up to `padded_rows`, or where that is 0 as their method wants it.
    """
    rows = [call.rows for call in calls]
    padded_rows = padded_rows or calls[0].method.padded_rows(sum(rows))
    args, kwargs = stack(calls, padded_rows)
    method = calls[0].method
    output = method.run(*args, **kwargs)
    padding = max(padded_rows - sum(rows), 0)
    return split(output, rows, padding, row_lists=bool(method.rules.row_lists))


def rows_are_independent(
    calls: Sequence[Call],
    max_rows: int,
    bucket_rows: int = 0,
    run: Callable[[Sequence[Call], int], list[Any]] = run_together,
) -> bool:
    """Whether each call has the same output bits alone and in every company that is tried.

    Args:
        calls: of equal keys, with different content.
        max_rows: most rows of a forward.
        bucket_rows: what every forward is filled up to; 0 leaves that to the method.
        run: as `run_together`, for calls that have to run elsewhere.
    """
    alone = [run([call], bucket_rows)[0] for call in calls]
    return all(
        same_bits(output, alone[index])
        for company in companies([call.rows for call in calls], bucket_rows or max_rows)
        for index, output in zip(
            company, run([calls[index] for index in company], bucket_rows), strict=True
        )
    )


def companies(rows: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Which calls, by index, to run together: every size of company, in changing order."""
    count = len(rows)
    size = 2
    while size <= max_rows:
        # Going round and round, each time from another place: neighbours and positions change.
        company = [index * (1 + size % 2) % count for index in range(size, 2 * size)]
        while sum(rows[index] for index in company) > max_rows:
            company.pop()
        yield company
        size += 1 if size < 4 else size // 2


def same_bits(one: Any, other: Any) -> bool:
    """Whether all tensors in two outputs are equal in every bit."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)
