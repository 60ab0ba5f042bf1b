from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_fakes import tensor_call
from stepserve.engine.calls.arguments import ArgumentKind, ArgumentRules, classify
from stepserve.engine.calls.call import MOST_KNOWN_KEYS, Call, ParkableMethod, longest, make_call
from stepserve.engine.calls.sharing import sharing_groups

SAMPLE = torch.zeros(2, 3)


def key(*args: Any, **kwargs: Any) -> Any:
    return tensor_call(*args, **kwargs).key


def test_prompts_noise_and_row_counts_stay_out_of_the_key() -> None:
    one = key(torch.rand(2, 3), torch.tensor(5), text=torch.rand(2, 7))
    other = key(torch.rand(6, 3), torch.tensor(9), text=torch.rand(6, 7))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "other",
    [
        key(torch.zeros(2, 4)),
        key(torch.zeros(2, 3, 1)),
        key(SAMPLE.double()),
        key(SAMPLE, torch.zeros(2, 3)),
        key(sample=SAMPLE),
    ],
    ids=["size", "dimensions", "dtype", "one more", "by keyword"],
)
def test_shapes_dtypes_and_arguments_must_agree(other: Any) -> None:
    assert key(SAMPLE) != other


def test_methods_must_agree() -> None:
    decode = ParkableMethod("vae", "decode", lambda: None)
    encode = ParkableMethod("vae", "encode", lambda: None)
    assert tensor_call(SAMPLE, rule=decode).key != tensor_call(SAMPLE, rule=encode).key


def test_order_of_keywords_does_not_matter() -> None:
    text = torch.zeros(2, 7)
    assert key(SAMPLE, a=text, b=1) == key(SAMPLE, b=1, a=text)
    assert key(SAMPLE, extra={"a": 1, "b": 2}) == key(SAMPLE, extra={"b": 2, "a": 1})


@pytest.mark.parametrize("first", [None, {}, [], (), OrderedDict(), [None], {"a": None}])
@pytest.mark.parametrize("second", [None, {}, [], (), OrderedDict(), [None], {"a": None}])
def test_empty_containers_and_none_are_told_apart(first: Any, second: Any) -> None:
    same = type(first) is type(second) and first == second
    assert (key(SAMPLE, extra=first) == key(SAMPLE, extra=second)) is same


def test_left_out_is_not_none() -> None:
    assert key(SAMPLE) != key(SAMPLE, extra=None)
    assert key(SAMPLE) != key(SAMPLE, extra={})


def test_keys_of_a_dict_need_not_be_sortable() -> None:
    mixed = {1: "a", "b": 2, None: 3, (1, 2): 4}
    assert key(SAMPLE, extra=mixed) == key(SAMPLE, extra=dict(reversed(mixed.items())))


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (True, 1), (0.5, 0.6), ("a", "b"), (None, False)]
)
def test_plain_values_must_be_equal_and_of_one_type(one: Any, other: Any) -> None:
    assert key(SAMPLE, scale=one) == key(SAMPLE, scale=one)
    assert key(SAMPLE, scale=one) != key(SAMPLE, scale=other)


def test_objects_that_cannot_be_compared_must_be_the_same() -> None:
    unhashable = SimpleNamespace(a=1)
    assert key(SAMPLE, state=unhashable) == key(SAMPLE, state=unhashable)
    assert key(SAMPLE, state=unhashable) != key(SAMPLE, state=SimpleNamespace(a=1))
    generator = torch.Generator()
    assert key(SAMPLE, state=generator) != key(SAMPLE, state=torch.Generator())


def test_tensors_for_all_rows_must_have_the_same_content() -> None:
    ids = torch.arange(12.0).reshape(4, 3)
    assert key(SAMPLE, ids=ids) == key(torch.zeros(6, 3), ids=ids.clone())
    assert key(SAMPLE, ids=ids) != key(SAMPLE, ids=ids + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8])
def test_content_of_any_dtype_can_be_compared(dtype: torch.dtype) -> None:
    ids = torch.eye(5).to(dtype)
    assert key(SAMPLE, ids=ids) == key(SAMPLE, ids=ids.clone())
    assert key(SAMPLE, ids=ids) != key(SAMPLE, ids=ids.flip(0))


def test_timesteps_agree_however_they_are_given() -> None:
    """0-dim or one element, one a row, int or float, one row or two: all may share a forward."""
    one_row = torch.zeros(1, 3)
    keys = {
        key(SAMPLE, torch.tensor(7)),
        key(SAMPLE, torch.tensor(7.5)),
        key(SAMPLE, torch.tensor([7])),
        key(SAMPLE, torch.tensor([7.0, 7.0])),
        key(one_row, torch.tensor(7)),
        key(one_row, torch.tensor([7.0], dtype=torch.float64)),
    }
    assert len(keys) == 1


def test_half_precision_timesteps_are_not_mixed_with_others() -> None:
    """Promoting int64 to bfloat16 would turn 999 into 1000."""
    assert key(SAMPLE, torch.tensor(999)) != key(SAMPLE, torch.tensor(7.0, dtype=torch.bfloat16))


def test_ignored_arguments_may_be_anything() -> None:
    rule = ParkableMethod(
        "vae", "decode", lambda: None, rules=ArgumentRules(ignored=frozenset({"generator"}))
    )
    one, two = torch.Generator(), torch.Generator()
    keys = {
        tensor_call(SAMPLE, rule=rule, generator=value).key
        for value in (None, one, [one], [one, two], {"a": one})
    }
    assert len(keys) == 1


def test_ignoring_reaches_no_further_than_the_argument_itself() -> None:
    rule = ParkableMethod(
        "vae", "decode", lambda: None, rules=ArgumentRules(ignored=frozenset({"generator"}))
    )
    one = tensor_call(SAMPLE, rule=rule, extra={"generator": 1}).key
    other = tensor_call(SAMPLE, rule=rule, extra={"generator": 2}).key
    assert one != other


def test_named_shared_tensors_are_never_stacked() -> None:
    """By its sizes `ids` looks like two rows; only its name tells that it serves all of them."""
    rule = ParkableMethod(
        "flux", "forward", lambda: None, rules=ArgumentRules(shared=frozenset({"ids"}))
    )
    two_rows_ids = torch.zeros(2, 3)
    plain, named = (
        tensor_call(SAMPLE, ids=two_rows_ids),
        tensor_call(SAMPLE, rule=rule, ids=two_rows_ids),
    )
    assert [kind for kind, _ in plain.key.arguments] == [ArgumentKind.BATCHED] * 2
    assert [kind for kind, _ in named.key.arguments] == [ArgumentKind.BATCHED, ArgumentKind.SHARED]
    assert named.key != tensor_call(SAMPLE, rule=rule, ids=two_rows_ids + 1).key


def test_shared_tensors_do_not_decide_the_row_count() -> None:
    rule = ParkableMethod(
        "flux", "forward", lambda: None, rules=ArgumentRules(shared=frozenset({"a_ids"}))
    )
    assert tensor_call(rule=rule, a_ids=torch.zeros(9, 3), sample=torch.zeros(2, 3)).rows == 2


def test_arguments_by_position_are_ruled_by_the_name_of_their_parameter() -> None:
    rules = ArgumentRules(shared=frozenset({"ids"}))
    method = ParkableMethod("m", "f", lambda: None, parameters=("sample", "ids"), rules=rules)
    call = tensor_call(SAMPLE, torch.zeros(2, 3), rule=method)
    assert [kind for kind, _ in call.key.arguments] == [ArgumentKind.BATCHED, ArgumentKind.SHARED]


def test_rows_are_those_of_the_first_parameter_whatever_the_alphabet_says() -> None:
    method = ParkableMethod("m", "f", lambda: None, parameters=("sample", "encoded"))
    assert tensor_call(rule=method, encoded=torch.zeros(9, 3), sample=SAMPLE).rows == 2


def test_several_entries_for_each_row_are_stacked_only_with_as_many() -> None:
    rules = ArgumentRules(repeated=frozenset({"text"}))
    method = ParkableMethod("m", "f", lambda: None, rules=rules)

    def keyed(rows: int, entries: int) -> Any:
        return tensor_call(torch.zeros(rows, 3), rule=method, text=torch.zeros(entries, 5)).key

    assert keyed(2, 16) == keyed(1, 8)
    assert keyed(2, 16) != keyed(2, 8)


def test_a_list_with_one_entry_a_row_counts_the_rows_and_not_its_tensors() -> None:
    rules = ArgumentRules(row_lists=frozenset({"x"}))
    method = ParkableMethod("m", "f", lambda: None, parameters=("x", "t"), rules=rules)

    def called(*entries: Any) -> Any:
        return tensor_call(list(entries), torch.zeros(len(entries)), rule=method)

    latent, other = torch.zeros(16, 1, 4, 4), torch.zeros(16, 1, 4, 6)
    assert called(latent, latent).rows == 2
    assert called(latent).key == called(latent, latent).key
    assert called(latent).key != called(other).key
    assert called([(1, 4, 4)]).key == called([(1, 4, 4)], [(1, 4, 4)]).key
    assert called([(1, 4, 4)]).key != called([(1, 4, 5)]).key
    # What a row costs depends on its size, here as elsewhere.
    assert called(latent).key.form == called(latent, latent).key.form
    assert called(latent).key.form != called(other).key.form


@pytest.mark.parametrize(
    ("args", "kwargs", "rows"),
    [
        ((), {}, 1),
        ((1, "a"), {}, 1),
        ((torch.tensor(3), torch.zeros(5, 2)), {}, 5),
        (([torch.zeros(3, 2)],), {"a": torch.zeros(4, 2)}, 3),
        ((), {"b": torch.zeros(4, 2), "a": torch.zeros(3, 2)}, 3),
        ((torch.zeros(0, 2),), {}, 1),
    ],
)
def test_rows_are_those_of_the_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
) -> None:
    assert tensor_call(*args, **kwargs).rows == rows


def test_a_tensor_of_one_entry_beside_many_rows_serves_all() -> None:
    assert classify(torch.zeros(1, 77, 8), rows=2) is ArgumentKind.SHARED
    assert classify(torch.zeros(1, 77, 8), rows=1) is ArgumentKind.BATCHED


def test_cost_shape_forgets_what_does_not_cost() -> None:
    one = key(torch.zeros(2, 3), torch.tensor(1), scale=0.5, ids=torch.zeros(4, 3))
    other = key(torch.zeros(4, 3), torch.tensor([2.0]), scale=0.7, ids=torch.ones(5, 3))
    assert one != other
    assert one.form == other.form
    assert one.form != key(torch.zeros(2, 5), torch.tensor(1)).form


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": 1}, {"a": True}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ({"a": [[1], 2]}, {"a": [[1, 2]]}),
        ({"a": {"b": 1}}, {"a": {"c": 1}}),
        ({"a": torch.zeros(2, 7)}, {"a": torch.zeros(2, 8)}),
        ({"a": torch.zeros(3)}, {"a": torch.ones(3)}),
        ({"a": object()}, {"a": object()}),
        ({"a": None}, {"b": None}),
    ],
)
def test_known_keys_are_those_that_reading_anew_gives(first: Any, second: Any) -> None:
    method = ParkableMethod("m", "forward", lambda: None)
    for _ in range(2):
        for arguments in (first, second):
            found = tensor_call(SAMPLE, rule=method, **arguments).key
            fresh = ParkableMethod("m", "forward", lambda: None)
            assert found == tensor_call(SAMPLE, rule=fresh, **arguments).key
    assert (
        tensor_call(SAMPLE, rule=method, **first).key
        != tensor_call(SAMPLE, rule=method, **second).key
    )


def test_steps_of_one_size_share_a_key_and_objects_are_not_kept() -> None:
    method = ParkableMethod("m", "forward", lambda: None)
    keys = [tensor_call(torch.rand(2, 3), torch.tensor(t), rule=method).key for t in range(3)]
    assert keys[0] is keys[1] is keys[2]
    tensor_call(SAMPLE, generator=torch.Generator(), rule=method)
    tensor_call(SAMPLE, table=torch.zeros(5, 3), rule=method)
    assert len(method.known_keys) == 1


def test_known_keys_are_limited() -> None:
    method = ParkableMethod("m", "forward", lambda: None)
    for index in range(2 * MOST_KNOWN_KEYS + 1):
        tensor_call(SAMPLE, number=index, rule=method)
    assert len(method.known_keys) <= MOST_KNOWN_KEYS


def rows_of_tokens(mixes_lengths: bool = True) -> ParkableMethod:
    """A method that fills images and texts up to full tens of tokens, and then to the longest."""

    def tens(tensor: torch.Tensor) -> int:
        return -(-tensor.shape[0] // 10) * 10

    rules = ArgumentRules(
        row_lists=frozenset({"x", "text", "marks"}),
        row_tokens={"x": tens, "text": tens},
        mixes_lengths=mixes_lengths,
    )
    names = ("x", "t", "text", "marks")
    return ParkableMethod("m", "f", lambda: None, parameters=names, rules=rules)


def of_lengths(method: ParkableMethod, *rows: tuple[int, int], **more: Any) -> Call:
    """A call with an image and a text of so many tokens for each row."""
    images = [torch.zeros(image, 4) for image, _ in rows]
    texts = [torch.zeros(text, 8) for _, text in rows]
    return tensor_call(images, torch.zeros(len(rows)), texts, rule=method, **more)


def test_rows_of_any_length_share_where_a_forward_fills_them_up() -> None:
    method = rows_of_tokens()
    short, long = of_lengths(method, (5, 3)), of_lengths(method, (5, 3), (40, 12))
    assert short.key == long.key
    # The longest row decides what all rows of a forward cost.
    assert (short.length, long.length) == (10 + 10, 40 + 20)
    assert short.shape != long.shape == of_lengths(method, (31, 19)).shape
    assert longest([short, long, short]) is long
    # As many as the pipeline likes, of images that belong to one row.
    several = tensor_call([[torch.zeros(9, 4), torch.zeros(5, 4)]], torch.zeros(1), rule=method)
    one = tensor_call([[torch.zeros(5, 4)]], torch.zeros(1), rule=method)
    assert several.key == one.key
    assert (several.length, one.length) == (20, 10)


def test_of_rows_of_any_length_all_but_the_length_must_agree() -> None:
    method = rows_of_tokens()
    usual = of_lengths(method, (5, 3))
    halves = [torch.zeros(5, 4, dtype=torch.float16)]
    for other in (
        tensor_call(halves, torch.zeros(1), [torch.zeros(3, 8)], rule=method),
        tensor_call([torch.zeros(5, 4, 1)], torch.zeros(1), [torch.zeros(3, 8)], rule=method),
        tensor_call([[torch.zeros(5, 4)]], torch.zeros(1), [torch.zeros(3, 8)], rule=method),
        tensor_call([torch.zeros(5, 4)], torch.zeros(1), [None], rule=method),
        of_lengths(method, (5, 3), marks=[[0, 1]]),
    ):
        assert other.key != usual.key
    assert (
        of_lengths(method, (5, 3), marks=[[0, 1]]).key
        == of_lengths(method, (5, 3), marks=[[0, 0, 1]]).key
    )


def test_lengths_that_are_kept_apart_share_where_they_are_filled_up_to_the_same() -> None:
    method = rows_of_tokens(mixes_lengths=False)
    usual = of_lengths(method, (5, 3))
    assert usual.key == of_lengths(method, (7, 10)).key == of_lengths(method, (1, 1), (2, 2)).key
    # A mask is there where any part differs, even if the sum does not.
    for other in ((11, 3), (5, 11)):
        assert of_lengths(method, other).key != usual.key
    assert of_lengths(method, (5, 11)).key != of_lengths(method, (11, 5)).key
    assert of_lengths(method, (5, 3), (11, 3)).key != usual.key


def test_known_keys_tell_lengths() -> None:
    method = rows_of_tokens()
    for _ in range(2):
        assert [of_lengths(method, (tokens, 3)).length for tokens in (5, 15)] == [20, 30]


def test_rows_with_something_of_their_own_share_where_all_are_as_long() -> None:
    method = rows_of_tokens()

    def called(tokens: int, variant: str | None) -> Call:
        return make_call(
            method,
            ([torch.zeros(tokens, 4)], torch.zeros(1), [torch.zeros(3, 8)]),
            {},
            module_variant=variant,
        )

    short, other = called(5, None), called(7, "heart")
    long, styled, nearly = called(15, None), called(15, "star"), called(12, "heart")
    assert sharing_groups([short, long]) == [[short, long]]
    assert sharing_groups([short, other, long]) == [[short, other], [long]]
    assert sharing_groups([short, long, other]) == [[short, long], [other]]
    assert sharing_groups([short, other, long, styled, nearly]) == [
        [short, other],
        [long, styled, nearly],
    ]
