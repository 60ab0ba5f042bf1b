from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from engine_fakes import tensor_call
from hypothesis import given
from hypothesis import strategies as st
from stepserve.engine.calls.arguments import ArgumentRules
from stepserve.engine.calls.call import ParkableMethod
from stepserve.engine.calls.objects import UnsplittableError
from stepserve.engine.calls.stacking import split, stack
from transformers.modeling_outputs import BaseModelOutputWithPooling

Pair = namedtuple("Pair", ["left", "right"])

shapes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3))
templates = st.recursive(
    st.one_of(shapes, plain.map(lambda value: ("plain", value))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 9)), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        st.lists(inner, max_size=3).map(lambda items: OrderedDict(enumerate(items))),
    ),
    max_leaves=8,
)


def fill(template: Any, rows: int) -> Any:
    """A nested value like the template, with random tensors of `rows` rows for its shapes."""
    if isinstance(template, Pair):
        return Pair(*(fill(item, rows) for item in template))
    if isinstance(template, dict):
        return type(template)((name, fill(item, rows)) for name, item in template.items())
    if isinstance(template, list):
        return [fill(item, rows) for item in template]
    return template[1] if template[0] == "plain" else torch.rand(rows, *template)


def same(one: Any, other: Any) -> bool:
    """Equal structure, types, dtypes and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(template=templates, rows=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_split_undoes_stack(template: Any, rows: list[int]) -> None:
    values = [fill(template, count) for count in rows]
    calls = [
        tensor_call(torch.rand(count, 2), value) for count, value in zip(rows, values, strict=True)
    ]
    assert len({call.key for call in calls}) == 1
    (_, stacked), kwargs = stack(calls)
    assert not kwargs
    pieces = split(stacked, rows)
    assert all(map(same, pieces, values))


def test_a_single_call_is_the_plain_call() -> None:
    call = tensor_call(torch.rand(2, 3), [1], extra={"a": torch.tensor(1)})
    args, kwargs = stack([call])
    assert args is call.args
    assert kwargs is call.kwargs
    output = object()
    assert split(output, [2]) == [output]


def test_scalars_are_repeated_for_each_row_and_promoted() -> None:
    calls = [
        tensor_call(torch.zeros(1, 2), torch.tensor([7])),
        tensor_call(torch.zeros(2, 2), torch.tensor(8.5)),
        tensor_call(torch.zeros(3, 2), torch.tensor([1, 2, 3])),
    ]
    (_, timesteps), _ = stack(calls)
    assert timesteps.tolist() == [7.0, 8.5, 8.5, 1.0, 2.0, 3.0]


def test_shared_and_ignored_arguments_are_passed_once() -> None:
    rule = ParkableMethod(
        "m", "f", lambda: None, rules=ArgumentRules(ignored=frozenset({"generator"}))
    )
    ids = torch.rand(5, 3)
    generators = [torch.Generator(), torch.Generator()]
    calls = [
        tensor_call(torch.zeros(2, 2), rule=rule, ids=ids.clone(), generator=generator, scale=0.5)
        for generator in (generators, None)
    ]
    _, kwargs = stack(calls)
    assert torch.equal(kwargs["ids"], ids)
    assert kwargs["generator"] is generators
    assert kwargs["scale"] == 0.5


def test_several_entries_for_each_row_and_lists_of_rows_are_joined() -> None:
    rules = ArgumentRules(repeated=frozenset({"text"}), row_lists=frozenset({"shapes"}))
    rule = ParkableMethod("m", "f", lambda: None, rules=rules)
    texts = torch.rand(6, 2), torch.rand(3, 2)
    calls = [
        tensor_call(torch.zeros(2, 2), rule=rule, text=texts[0], shapes=["a", "b"]),
        tensor_call(torch.zeros(1, 2), rule=rule, text=texts[1], shapes=["a"]),
    ]
    _, kwargs = stack(calls)
    assert torch.equal(kwargs["text"], torch.cat(texts))
    assert kwargs["shapes"] == ["a", "b", "a"]


def test_rows_in_the_second_dimension_are_joined_there() -> None:
    rules = ArgumentRules(layered=frozenset({"states"}))
    rule = ParkableMethod("m", "f", lambda: None, rules=rules)
    states = torch.rand(2, 2, 5), torch.rand(2, 1, 5)
    calls = [
        tensor_call(torch.zeros(value.shape[1], 2), rule=rule, states=value) for value in states
    ]
    assert calls[0].key == calls[1].key
    _, kwargs = stack(calls, padded_rows=4)
    assert torch.equal(kwargs["states"], torch.cat([*states, states[1]], dim=1))


def test_a_list_with_one_entry_a_row_is_cut_where_the_method_deals_in_such_lists() -> None:
    entries = [torch.rand(4, 2) for _ in range(3)]
    first, second = split((entries,), [2, 1], row_lists=True)
    assert same(first, (entries[:2],))
    assert same(second, (entries[2:],))


@given(template=templates, rows=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_padding_repeats_the_last_row_and_is_cut_off_again(template: Any, rows: list[int]) -> None:
    values = [fill(template, count) for count in rows]
    steps = torch.tensor(7)
    calls = [tensor_call(torch.rand(r, 2), steps, v) for v, r in zip(values, rows, strict=True)]
    padding = 3
    args, _ = stack(calls, padded_rows=sum(rows) + padding)
    assert args[0].shape[0] == args[1].shape[0] == sum(rows) + padding
    assert torch.equal(args[0][-padding:], calls[-1].args[0][-1:].expand(padding, 2))
    pieces = split(args, rows, padding)
    for call, piece in zip(calls, pieces, strict=True):
        assert torch.equal(piece[0], call.args[0])
        assert same(piece[2], call.args[2])


def test_keywords_in_another_order_are_stacked_by_name() -> None:
    ones, twos = torch.ones(1, 2), torch.full((1, 2), 2.0)
    _, kwargs = stack([tensor_call(a=ones, b=twos), tensor_call(b=twos, a=ones)])
    assert torch.equal(kwargs["a"], torch.ones(2, 2))
    assert torch.equal(kwargs["b"], torch.full((2, 2), 2.0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_latent_distributions_are_cut_with_all_they_have_derived(deterministic: bool) -> None:
    parameters = torch.rand(3, 8, 2, 2)
    whole = DiagonalGaussianDistribution(parameters, deterministic)
    pieces = split(AutoencoderKLOutput(latent_dist=whole), [1, 2])
    for piece, own in zip(pieces, parameters.split([1, 2]), strict=True):
        wanted = DiagonalGaussianDistribution(own, deterministic)
        assert type(piece) is AutoencoderKLOutput
        for name, value in vars(wanted).items():
            assert same(getattr(piece.latent_dist, name), value), name
    assert whole.mean.shape[0] == 3


def test_output_objects_of_diffusers_and_transformers_are_rebuilt() -> None:
    sample = torch.rand(3, 4)
    for output, name in (
        (UNet2DConditionOutput(sample=sample), "sample"),
        (DecoderOutput(sample=sample, commit_loss=None), "sample"),
        (BaseModelOutputWithPooling(last_hidden_state=sample), "last_hidden_state"),
    ):
        first, second = split(output, [1, 2])
        assert type(first) is type(output)
        assert torch.equal(first[0], sample[:1])
        assert torch.equal(getattr(second, name), sample[1:])
        assert list(second.keys()) == list(output.keys())


def test_nested_tuples_in_output_objects_are_cut() -> None:
    hidden = tuple(torch.rand(3, 4) for _ in range(2))
    output = BaseModelOutputWithPooling(last_hidden_state=hidden[0], hidden_states=hidden)
    first, _ = split(output, [1, 2])
    assert [layer.shape[0] for layer in first.hidden_states] == [1, 1]


@dataclass(frozen=True)
class FrozenOutput:
    sample: torch.Tensor
    name: str = "frozen"


def test_frozen_dataclasses_are_rebuilt() -> None:
    sample = torch.rand(3, 4)
    first, second = split(FrozenOutput(sample), [2, 1])
    assert torch.equal(first.sample, sample[:2])
    assert isinstance(second, FrozenOutput)
    assert torch.equal(second.sample, sample[2:])


class Slotted:
    __slots__ = ("sample",)

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


class CopiesToItself:
    def __init__(self) -> None:
        self.sample = torch.rand(3, 4)

    def __copy__(self) -> CopiesToItself:
        return self


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor(0.5),
        torch.rand(2, 4),
        (torch.rand(3, 4), torch.rand(1, 4)),
        {"sample": torch.rand(3, 4), "loss": torch.tensor(1.0)},
        DecoderOutput(sample=torch.rand(3, 4), commit_loss=torch.tensor(1.0)),
        Slotted(torch.rand(3, 4)),
        CopiesToItself(),
        {1, 2},
    ],
    ids=["0-dim", "fewer rows", "one entry", "loss", "commit loss", "slots", "itself", "set"],
)
def test_what_cannot_be_told_apart_is_refused(output: Any) -> None:
    """Rather than handing every call the whole, which holds the others' results."""
    with pytest.raises(UnsplittableError):
        split(output, [1, 2])


def test_plain_values_go_to_every_call_and_mutable_containers_do_not() -> None:
    cache: list[Any] = []
    first, second = split({"sample": torch.rand(2, 1), "n": 3, "cache": cache}, [1, 1])
    assert first["n"] == second["n"] == 3
    assert first["cache"] == second["cache"] == []
    assert first["cache"] is not second["cache"]
