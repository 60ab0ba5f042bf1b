from __future__ import annotations

from typing import Any

import pytest
import torch
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.modules.third_party.memoized_tokenizers import (
    MOST_TEXTS,
    memoizing_tokenizer,
)

PADDED = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": "pt"}


class Calls:
    """Counts the calls that reach a tokenizer's own code."""

    def __init__(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = type(tokenizer)._encode_plus

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(type(tokenizer), "_encode_plus", counting)


@pytest.fixture
def plain(tiny: LoadedModel) -> Any:
    return tiny.pipeline.tokenizer


@pytest.mark.parametrize("text", ["red heart", "", ["red heart", "pizza"]])
@pytest.mark.parametrize(
    "arguments", [{}, PADDED, {"padding": "longest", "return_tensors": "pt"}, {"padding": True}]
)
def test_answers_are_those_of_the_tokenizer(
    plain: Any, text: str | list[str], arguments: dict[str, Any]
) -> None:
    tokenizer = memoizing_tokenizer(plain)
    expected = plain(text, **arguments)
    for _ in range(2):
        found = tokenizer(text, **arguments)
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for name, part in expected.items():
            same = torch.equal if isinstance(part, torch.Tensor) else lambda a, b: a == b
            assert same(found[name], part)


def test_the_same_text_is_read_once(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = memoizing_tokenizer(plain)
    calls = Calls(plain, monkeypatch)
    for _ in range(3):
        tokenizer("red heart", **PADDED)
        assert tokenizer.tokenize("red heart") == plain.tokenize("red heart")
    # One call of each, and three of the plain one.
    assert calls.count == 1 + 1 + 3


def test_arguments_are_told_apart(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = memoizing_tokenizer(plain)
    calls = Calls(plain, monkeypatch)
    tokenizer("red", max_length=4, truncation=True)
    tokenizer("red", max_length=5, truncation=True)
    tokenizer(["red"], max_length=5, truncation=True)
    tokenizer("red", max_length=5, truncation=True)
    assert calls.count == 3


def test_whoever_writes_into_an_answer_spoils_nobody_elses(plain: Any) -> None:
    tokenizer = memoizing_tokenizer(plain)
    expected = plain("red heart", **PADDED).input_ids
    tokenizer("red heart", **PADDED).input_ids.zero_()
    tokenizer("red heart", **PADDED).data.clear()
    tokenizer.tokenize("red heart").clear()
    assert torch.equal(tokenizer("red heart", **PADDED).input_ids, expected)
    assert tokenizer.tokenize("red heart") == plain.tokenize("red heart")


def test_an_attribute_that_is_set_makes_it_forget(plain: Any) -> None:
    tokenizer = memoizing_tokenizer(plain)
    right = tokenizer("red", **PADDED).input_ids
    before = plain.padding_side
    tokenizer.padding_side = "left"
    assert not torch.equal(tokenizer("red", **PADDED).input_ids, right)
    # The resident one is left as it was.
    assert plain.padding_side == before


def test_it_keeps_a_limited_number(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = memoizing_tokenizer(plain)
    for index in range(MOST_TEXTS + 1):
        tokenizer(f"red {index}")
    calls = Calls(plain, monkeypatch)
    tokenizer(f"red {MOST_TEXTS}")
    assert calls.count == 0
    tokenizer("red 0")
    assert calls.count == 1


def test_lent_pipelines_share_one_of_the_same_class_name(tiny: LoadedModel, plain: Any) -> None:
    one, other = tiny.lender.lend(), tiny.lender.lend()
    assert one.tokenizer is other.tokenizer
    assert isinstance(one.tokenizer, type(plain))
    assert type(one.tokenizer).__name__ == type(plain).__name__
    assert tiny.pipeline.tokenizer is plain
