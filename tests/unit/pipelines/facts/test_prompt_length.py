from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from stepserve.domain.errors import InvalidRequestError
from stepserve.pipelines.facts.prompts import TokenCounter
from stepserve.pipelines.loading.folders import LoadedModel
from tiny_model import MAX_TOKENS, a_request


def test_a_prompt_that_just_fits_is_let_in(tiny: LoadedModel) -> None:
    """The tiny tokenizer counts letters; start and end marks are two more."""
    tiny.prompt_meter.check(a_request(prompt="a" * (MAX_TOKENS - 2)))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_one_token_more_is_refused_with_field_value_and_limit(
    tiny: LoadedModel, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        tiny.prompt_meter.check(a_request(**{field: "a" * (MAX_TOKENS - 1)}))
    assert refused.value.field == field
    assert refused.value.message == (
        f"{field} is {MAX_TOKENS + 1} tokens long and the limit of model tiny is {MAX_TOKENS}, "
        "start and end marks included"
    )


def test_counting_is_right_while_a_pipeline_pads_and_cuts(tiny: LoadedModel) -> None:
    """A tokenizer keeps how it pads and cuts as state: counting must not share the pipeline's."""
    tokenizer = tiny.pipeline.tokenizer
    counter = TokenCounter(tokenizer, MAX_TOKENS)
    long, short = "a" * 40, "a"

    def encode_as_pipeline(_: int) -> int:
        ids = tokenizer(
            short, padding="max_length", max_length=MAX_TOKENS, truncation=True
        ).input_ids
        return len(ids)

    with ThreadPoolExecutor(4) as pool:
        counted = pool.map(counter.count, [long] * 200)
        # One at a time, as on the engine thread.
        padded = [encode_as_pipeline(index) for index in range(200)]
        assert set(counted) == {42}
    assert set(padded) == {MAX_TOKENS}


def test_the_pipelines_tokenizer_is_left_as_it_was(tiny: LoadedModel) -> None:
    before = tiny.pipeline.tokenizer.backend_tokenizer.to_str()
    TokenCounter(tiny.pipeline.tokenizer, MAX_TOKENS).count("a" * 99)
    assert tiny.pipeline.tokenizer.backend_tokenizer.to_str() == before
