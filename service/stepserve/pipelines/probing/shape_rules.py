"""How many rows forwards of each size may have: found out when a size first comes.

What `plan_sharing` finds out holds for the native size. The libraries of a GPU choose their kernels
by the size of an image as well: on an H200 the rows of the embedded model keep their bits in
forwards of up to 12 rows at 64x64, of 6 at 96x96 and of one at 48x64. Filling forwards up cures it.

On a CPU this would hold everybody up for seconds, and no size was ever seen to differ from the
native one there; so it is for other devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from stepserve.engine.batch_invariance import (
    agreeing_row_counts,
    fitting_row_counts,
    one_row,
    varied,
)
from stepserve.engine.calls.call import Call, ParkableMethod
from stepserve.pipelines.probing.sharing_plan import TRIED_CALLS, RowCounts, same_bits

logger = logging.getLogger(__name__)


class SizeRules:
    """Gives each call the row counts that calls of its shape need. For the engine's thread.

    Args:
        most_rows: most rows of a forward at the moment.
        fix_rows: whether forwards may be filled up for the sake of equal bytes.
    """

    def __init__(self, most_rows: Callable[[], int], fix_rows: bool) -> None:
        self.same_bytes = True
        self._most_rows = most_rows
        self._fix_rows = fix_rows
        self._methods: dict[Hashable, ParkableMethod] = {}

    def __call__(self, call: Call) -> Call:
        """The call, with its method as its shape needs it."""
        if call.method.max_rows == 1:
            return call
        shape = call.shape
        if shape not in self._methods:
            self._methods[shape] = self._find(call)
        method = self._methods[shape]
        return call if call.method is method else replace(call, method=method)

    def _find(self, call: Call) -> ParkableMethod:
        try:
            with torch.no_grad():
                method = self._try(call)
        except Exception as error:
            logger.warning("%s: rows could not be compared: %s", call.method.name, error)
            method = None
        if method is None:
            self.same_bytes = False
            logger.info("%s: rows depend on co-batched requests: %s", call.method.name, call.shape)
        return method or call.method

    def _try(self, call: Call) -> ParkableMethod | None:
        """The method with other row counts where it takes them; None where none helps."""
        generator = torch.Generator().manual_seed(0)
        calls = [varied(one_row(call), generator) for _ in range(TRIED_CALLS)]
        method, most = call.method, min(call.method.max_rows, self._most_rows())
        if method.bucket_rows:
            fitting = fitting_row_counts(calls[0], method.bucket_rows)
            if not fitting or agreeing_row_counts(calls, fitting) != fitting:
                return None
            if fitting == method.bucket_rows:
                return method
            return replace(method, max_rows=min(most, fitting[-1]), bucket_rows=fitting)
        found = same_bits([calls], most, self._fix_rows)
        if found is None:
            return None
        if found == RowCounts(most):
            return method
        return replace(method, max_rows=found.most, bucket_rows=found.filled)
