"""Does a row get the same bits whatever it shares a forward with? Tried on the device at hand.

Kernels may sum in another order for another row count, so that the last bits of a row depend on how
many others there are. Most devices, dtypes and models are free of that up to some row count; others
are within forwards of one fixed row count, filled up where requests have fewer.

A difference can hide: half precision rounds most of it away. What shows it least is a layer that
gets one vector a row, such as an embedding of the timestep: a forward tells of a few numbers only.
Such layers are therefore tried by themselves as well, with far more rows than requests would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stepserve.engine.calls.arguments import ArgumentKind, flatten, unflatten
from stepserve.engine.calls.call import Call, ParkableMethod, enter, make_call
from stepserve.engine.calls.stacking import share_out, split, stack, tensors_in
from stepserve.engine.device_errors import is_out_of_memory

Result = TypeVar("Result")

# Where kernels differ at all, about one number in 10,000 was seen to: enough of them to be sure.
VECTOR_NUMBERS = 2**16


def independent_rows(calls: Sequence[Call], max_rows: int) -> int:
    """Most rows of a forward in which each call has the bits of its own forward, as far as tried.

    Args:
        calls: of equal keys, with different content.
        max_rows: where to stop trying.

    Returns:
        `max_rows`, or the row count before the first one where bits differ or memory runs out; 1 if
        that is 2.
    """
    serial = [run_together([call])[0] for call in calls]
    kept = 1
    for count in row_counts(max_rows):
        if not _if_memory_suffices(partial(keep_bits, calls, serial, count)):
            return kept
        kept = count
    return kept


def agreeing_row_counts(calls: Sequence[Call], counts: Sequence[int]) -> tuple[int, ...]:
    """Row counts whose forwards give each call the same bits, whichever calls share them.

    Args:
        calls: of equal keys, with different content.
        counts: what forwards could be filled up to; the first is what the others are compared with.

    Returns:
        Those of `counts` that agree with the first one; none if bits depend on the other calls, or
        memory runs out for it.
    """
    serial = _if_memory_suffices(lambda: [run_together([call], counts[0])[0] for call in calls])
    if serial is None:
        return ()
    agreeing = [
        count
        for count in counts
        if _if_memory_suffices(partial(_keep_bits_in, calls, serial, count))
    ]
    return tuple(agreeing) if counts[0] in agreeing else ()


def fitting_row_counts(call: Call, counts: Sequence[int]) -> tuple[int, ...]:
    """Those of the row counts for which there is enough memory."""
    return tuple(
        count
        for count in counts
        if _if_memory_suffices(partial(run_together, [call], count)) is not None
    )


def vector_layer_calls(call: Call, least: int, generator: torch.Generator) -> list[list[Call]]:
    """Calls of each kind of layer in a module that gets one vector a row.

    Args:
        call: of the module; it is run once.
        least: calls of each layer.
        generator: on the CPU.
    """
    found: dict[Hashable, tuple[nn.Linear, float]] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Linear) or not args or not isinstance(args[0], Tensor):
            return
        if args[0].numel() == call.rows * module.in_features:
            # What kernels are chosen by.
            shape = module.weight.shape, module.weight.dtype, module.bias is None
            size = float(args[0].detach().float().square().mean().sqrt())
            found.setdefault(shape, (module, size))

    with register_module_forward_pre_hook(look):
        run_together([call])
    return [_calls_of(layer, size, least, generator) for layer, size in found.values()]


def varied(call: Call, generator: torch.Generator) -> Call:
    """The same call with other numbers: every one is scaled down by a factor of its own.

    What is batched or in a list of rows, and of integers only timesteps: others may be masks or
    places in a table.
    """
    kinds = [kind for kind, _ in call.key.arguments]
    return call.with_leaves(
        [_vary(*pair, generator) for pair in zip(call.leaves, kinds, strict=True)], call.rows
    )


def one_row(call: Call) -> Call:
    """The first row of a call."""
    kinds = [kind for kind, _ in call.key.arguments]
    return call.with_leaves(
        [_first_row(*pair, call.rows) for pair in zip(call.leaves, kinds, strict=True)], 1
    )


def row_counts(max_rows: int) -> list[int]:
    """Row counts to try, from 2 in growing steps, up to and with `max_rows`."""
    powers = [2**exponent for exponent in range(1, max_rows.bit_length())]
    counts = {count for power in powers for count in (power, power * 3 // 2)}
    return sorted(count for count in {*counts, max_rows} if 2 <= count <= max_rows)


def groups_of(rows: Sequence[int], count: int) -> Iterator[list[int]]:
    """Which calls, by index, to run together so that each takes part in a forward of `count` rows.

    Where sizes do not fit there are fewer rows. Calls come in changing order: neighbours and places
    change from count to count.
    """
    stride = next(s for s in range(count, count + len(rows) + 1) if math.gcd(s, len(rows)) == 1)
    order = [index * stride % len(rows) for index in range(len(rows))]
    smallest = min(rows, default=0)
    seen: set[int] = set()
    for turn, index in enumerate(order):
        if index in seen or rows[index] > count:
            continue
        group = _fill_up(order, turn, rows, count, smallest)
        seen.update(group)
        yield group


def run_together(calls: Sequence[Call], padded_rows: int = 0) -> list[Any]:
    """Outputs of calls with equal keys, from one shared forward.

    It is filled up to `padded_rows`, or where that is 0 as their method wants it.
    """
    rows = [call.rows for call in calls]
    method = calls[0].method
    padded_rows = padded_rows or method.padded_rows(sum(rows))
    padding = max(padded_rows - sum(rows), 0)
    arguments = stack(calls, padded_rows)
    enter(calls, padding)
    output = method.run(*arguments[0], **arguments[1])
    return share_out(calls, arguments, output, padding)


def same_bits(one: Any, other: Any) -> bool:
    """Whether all tensors in two outputs are equal in every bit."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def _if_memory_suffices(attempt: Callable[[], Result]) -> Result | None:
    """What the attempt returns; None where memory runs out."""
    try:
        return attempt()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def keep_bits(
    calls: Sequence[Call], serial: Sequence[Any], count: int, bucket_rows: int = 0
) -> bool:
    """Whether each call has the bits of its own forward, in groups of `count` rows.

    Args:
        calls: of equal keys, with different content.
        serial: the output of each from a forward of its own.
        count: rows of calls that run together, as far as their sizes fit.
        bucket_rows: what forwards are filled up to; 0: as their method wants it.
    """
    return all(
        same_bits(output, serial[index])
        for group in groups_of([call.rows for call in calls], count)
        for index, output in zip(
            group, run_together([calls[index] for index in group], bucket_rows), strict=True
        )
    )


def _keep_bits_in(calls: Sequence[Call], serial: Sequence[Any], bucket_rows: int) -> bool:
    # What fills a forward up shares it, too: few counts are enough.
    counts = {max(bucket_rows // 2, 1), bucket_rows}
    return all(keep_bits(calls, serial, count, bucket_rows) for count in counts)


def _fill_up(
    order: Sequence[int], turn: int, rows: Sequence[int], count: int, smallest: int
) -> list[int]:
    """Calls in that order from `turn` on, round and round, while any fits."""
    group: list[int] = []
    left = count
    while left >= smallest:
        index = order[turn % len(order)]
        turn += 1
        if rows[index] <= left:
            group.append(index)
            left -= rows[index]
    return group


def _vary(value: Any, kind: ArgumentKind, generator: torch.Generator) -> Any:
    if kind is ArgumentKind.ROW_LIST:
        leaves, structure = flatten(value)
        varied = [_vary(leaf, ArgumentKind.BATCHED, generator) for leaf in leaves]
        return unflatten(structure, varied)
    if not isinstance(value, Tensor) or value.dtype is torch.bool or value.is_complex():
        return value
    if kind is ArgumentKind.PER_ROW or (kind is ArgumentKind.BATCHED and value.is_floating_point()):
        factors = torch.rand(value.shape, generator=generator).to(value.device)
        # The first timestep of some schedulers is 0.
        is_zero = (value == 0) & (kind is ArgumentKind.PER_ROW)
        return torch.where(is_zero, factors, value * factors).to(value.dtype)
    return value


def _first_row(value: Any, kind: ArgumentKind, rows: int) -> Any:
    is_per_row = kind is ArgumentKind.PER_ROW and value.dim() > 0
    if kind in (ArgumentKind.ROW_LIST, ArgumentKind.BATCHED) or is_per_row:
        return value[:1]
    if kind is ArgumentKind.REPEATED:
        return value[: value.shape[0] // rows]
    if kind is ArgumentKind.CACHE and rows > 1:
        return split(value, [1], padding=rows - 1)[0]
    return value[:, :1] if kind is ArgumentKind.LAYERED else value


def _calls_of(layer: nn.Linear, size: float, least: int, generator: torch.Generator) -> list[Call]:
    """Calls of one row each, with vectors of their own of that size; `least` of them or more."""
    count = max(VECTOR_NUMBERS // layer.out_features, least)
    vectors = torch.randn(count, layer.in_features, generator=generator) * size
    method = ParkableMethod("layer", "forward", layer.forward)
    rows = vectors.to(layer.weight.device, layer.weight.dtype).split(1)
    return [make_call(method, (row,), {}) for row in rows]
