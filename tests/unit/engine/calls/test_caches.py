"""Objects that keep keys and values from step to step: joined by row, and filled for each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepserve.engine.batch_invariance import one_row, run_together
from stepserve.engine.calls.arguments import ArgumentKind, ArgumentRules
from stepserve.engine.calls.call import Call, ParkableMethod, make_call
from stepserve.engine.calls.objects import UnsplittableError
from stepserve.engine.calls.stacking import share_out, stack


class Layer:
    """As diffusers has them: empty until a first step fills it."""

    def __init__(self, keys: torch.Tensor | None = None) -> None:
        self.keys = keys


class Cache:
    def __init__(self, *layers: Layer, tokens: int = 0) -> None:
        self.layers = list(layers)
        self.tokens = tokens


def step(sample: torch.Tensor, cache: Cache | None = None, mode: str = "read") -> torch.Tensor:
    """What the first step does to the cache, and the later ones with it."""
    assert cache is not None
    output = sample
    for index, layer in enumerate(cache.layers):
        if mode == "fill":
            layer.keys = sample * (index + 1)
        assert layer.keys is not None
        output = output + layer.keys
    return output


METHOD = ParkableMethod(
    "transformer",
    "forward",
    step,
    parameters=("sample", "cache", "mode"),
    rules=ArgumentRules(caches=frozenset({"cache"})),
)


def call(value: float, rows: int = 1, mode: str = "read", cache: Cache | None = None) -> Call:
    sample = torch.full((rows, 2), value)
    return make_call(METHOD, (sample,), {"cache": cache or filled(value, rows), "mode": mode})


def filled(value: float, rows: int) -> Cache:
    return Cache(Layer(torch.full((rows, 2), value)), Layer(torch.full((rows, 2), 2 * value)))


def test_caches_are_read_row_by_row() -> None:
    calls = [call(1.0), call(10.0, rows=2), call(100.0)]
    assert len({each.key for each in calls}) == 1
    outputs = run_together(calls)
    assert [output.unique().item() for output in outputs] == [4.0, 40.0, 400.0]
    assert [len(output) for output in outputs] == [1, 2, 1]


@pytest.mark.parametrize("padded_rows", [0, 8])
def test_each_call_gets_what_the_forward_wrote_into_its_rows(padded_rows: int) -> None:
    caches = [Cache(Layer(), Layer()) for _ in range(3)]
    rows = (1, 2, 1)
    calls = [call(float(i), rows[i], "fill", cache) for i, cache in enumerate(caches)]
    run_together(calls, padded_rows)
    for index, cache in enumerate(caches):
        first, second = (layer.keys for layer in cache.layers)
        assert first is not None
        assert second is not None
        assert torch.equal(first, torch.full((rows[index], 2), float(index)))
        assert torch.equal(second, first * 2)


def test_a_single_call_has_its_own_cache_filled() -> None:
    cache = Cache(Layer())
    run_together([call(3.0, mode="fill", cache=cache)])
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.unique().item() == 3.0


def test_the_caches_of_calls_are_not_written_to_by_a_forward_that_fails() -> None:
    caches = [Cache(Layer(), Layer()) for _ in range(2)]
    calls = [call(float(i), 1, "fill", cache) for i, cache in enumerate(caches)]
    arguments = stack(calls)
    METHOD.run(*arguments[0], **arguments[1])
    with pytest.raises(UnsplittableError):
        share_out(calls, arguments, torch.zeros(5))
    assert [layer.keys for cache in caches for layer in cache.layers] == [None] * 4


@pytest.mark.parametrize(
    "other",
    [
        Cache(Layer(), Layer()),
        Cache(Layer(torch.ones(1, 2))),
        Cache(Layer(torch.ones(1, 3)), Layer(torch.ones(1, 3))),
        Cache(Layer(torch.ones(1, 2).double()), Layer(torch.ones(1, 2).double())),
        Cache(Layer(torch.ones(1, 2)), Layer(torch.ones(1, 2)), tokens=4),
    ],
    ids=["empty", "fewer layers", "another length", "another dtype", "another number"],
)
def test_what_cannot_be_joined_does_not_share(other: Cache) -> None:
    assert call(1.0).key != call(1.0, cache=other).key


def test_calls_of_the_first_step_do_not_share_with_later_ones() -> None:
    assert call(1.0, mode="fill").key != call(1.0).key


@pytest.mark.parametrize("value", [None, "a name", Cache(Layer(torch.ones(7, 2))), object()])
def test_what_holds_no_rows_is_compared_as_it_is(value: Any) -> None:
    other = make_call(METHOD, (torch.ones(1, 2),), {"cache": value})
    assert other.key.arguments[1][0] is ArgumentKind.PLAIN


def test_the_first_row_of_a_call_has_the_first_row_of_its_cache() -> None:
    cache = Cache(Layer(torch.tensor([[1.0], [2.0], [3.0]])))
    first = one_row(make_call(METHOD, (torch.zeros(3, 1),), {"cache": cache}))
    assert METHOD.run(*first.args, **first.kwargs).tolist() == [[1.0]]
