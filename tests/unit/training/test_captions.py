"""Captions say what is to be seen; tokens are the same everywhere and cover any text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from stepserve.training.data.captions import (
    Caption,
    find_tokenizer,
    keep_tokenizer,
    train_tokenizer,
    write_caption,
)
from stepserve.training.data.images import BACKGROUNDS
from transformers import CLIPTokenizer

NAMES = ("red heart", "octopus", "fire engine", "grinning face with big eyes", "8 ball", "pinata")
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(NAMES, 900, MAX_TOKENS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_caption_names_image_and_colour(name: str, background: str) -> None:
    chance = random.Random(0)
    for _ in range(50):
        text = write_caption(Caption(name, "noto", background), chance)
        assert name in text
        assert background == "white" or f"{background} background" in text


def test_white_goes_mostly_unmentioned() -> None:
    chance = random.Random(0)
    caption = Caption("octopus", "noto", "white")
    mentions = sum("white" in write_caption(caption, chance) for _ in range(2000))
    assert 200 < mentions < 400


def test_style_is_named_now_and_then_and_articles_fit() -> None:
    chance = random.Random(0)
    texts = [write_caption(Caption("octopus", "fluent", "white"), chance) for _ in range(500)]
    assert 150 < sum("fluent" in text for text in texts) < 350
    assert any(text.startswith("an octopus") for text in texts)
    assert not any(text.startswith("a octopus") for text in texts)


def test_known_words_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("red heart on a light blue background").input_ids
    assert len(ids) == 7 + 2
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text", ["zyzzyva quux", "grüße, señor!", "日本の寿司", "🍕🚀", "x²≤½", "a\tb\nc", ""]
)
def test_any_text_can_be_encoded_and_read_back(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    inner = ids[1:-1]
    assert max(ids) < len(tokenizer)
    assert tokenizer.eos_token_id not in inner  # that is the unknown token, too
    back = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(back.split()) == "".join(text.lower().split())


def test_long_text_is_cut_to_the_fixed_length(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.model_max_length == MAX_TOKENS
    encoded = tokenizer("octopus " * 100, truncation=True, padding="max_length")
    assert len(encoded.input_ids) == MAX_TOKENS


def test_saving_and_finding_keeps_every_token(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    keep_tokenizer(tokenizer, tmp_path / "kept")
    again = find_tokenizer(tmp_path / "absent", tmp_path / "kept")
    assert again is not None
    assert again.get_vocab() == tokenizer.get_vocab()
    for text in (*NAMES, "zyzzyva 日本 ½"):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert find_tokenizer(tmp_path / "absent") is None


def test_every_process_trains_the_same_tokenizer(tokenizer: CLIPTokenizer) -> None:
    program = (
        "import json, sys; from stepserve.training.data.captions import train_tokenizer; "
        "names = json.loads(sys.argv[1]); t = train_tokenizer(names, 900, 24); "
        "print(json.dumps([t.get_vocab(), [t(name).input_ids for name in names]]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(NAMES)],
        capture_output=True,
        text=True,
        check=True,
    )
    vocabulary, ids = json.loads(result.stdout)
    assert vocabulary == tokenizer.get_vocab()
    assert ids == [tokenizer(name).input_ids for name in NAMES]
